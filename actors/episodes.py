"""From a problem to its completions: render, embed, generate, in reading order. Training and evaluation go this way."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from actors.ports import EmbeddingService, EmbedReport, FeaturesRef, Sampling
from actors.rollout_pool import RolloutPool
from rlsys.data.prompts import PromptRenderer
from rlsys.types import Completion, Problem, Prompt


@dataclass(frozen=True)
class Generated:
    """A prompt with its completions, and the features that the learner needs again."""

    prompt: Prompt
    features: FeaturesRef
    embedded: EmbedReport
    completions: tuple[Completion, ...]


class Episodes:
    """What becomes of one problem."""

    def __init__(self, renderer: PromptRenderer, embedders: Sequence[EmbeddingService], pool: RolloutPool) -> None:
        self._renderer = renderer
        self._embedders = embedders
        self._pool = pool

    async def generate(self, problem: Problem, sampling: Sampling) -> Generated:
        """Write completions for a problem."""
        prompt = self._renderer.render(problem)
        with self._pool.preparing():
            features, embedded = await self._embedders[self._replica(prompt)].embed(_sequences(prompt, problem))
        completions = await self._pool.generate(prompt, sampling, features)
        return Generated(prompt, features, embedded, completions)

    def demonstration(self, problem: Problem) -> tuple[Prompt, tuple[int, ...]]:
        """A problem's prompt with the tokens that SFT imitates."""
        return self._renderer.render(problem), self._renderer.demonstration_ids(problem)

    async def embed(self, batch: Sequence[tuple[Prompt, Problem]]) -> list[FeaturesRef]:
        """Features for many prompts at once: one reference for each replica that has some of them."""
        sequences: defaultdict[int, dict[str, str]] = defaultdict(dict)
        for prompt, problem in batch:
            sequences[self._replica(prompt)] |= _sequences(prompt, problem)
        answers = await asyncio.gather(
            *(self._embedders[replica].embed(wanted) for replica, wanted in sequences.items())
        )
        return [features for features, _ in answers]

    def _replica(self, prompt: Prompt) -> int:
        """The same one for a sequence every time, so that it is cached once."""
        return sum(prompt.slots[0].key.encode()) % len(self._embedders) if prompt.slots else 0


def _sequences(prompt: Prompt, problem: Problem) -> dict[str, str]:
    return {slot.key: sequence for slot, sequence in zip(prompt.slots, problem.dna, strict=True)}
