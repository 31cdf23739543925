"""From a problem to its completions: render, embed, generate, in reading order. Training and evaluation go this way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from actors.embedder_pool import EmbedderPool
from actors.ports import EmbedReport, FeaturesRef, Sampling
from actors.rollout_pool import RolloutPool
from rlsys.data.prompts import PromptRenderer
from rlsys.pipeline.waits import Cause
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

    def __init__(self, renderer: PromptRenderer, embedders: EmbedderPool, pool: RolloutPool) -> None:
        self._renderer = renderer
        self._embedders = embedders
        self._pool = pool

    async def generate(self, problem: Problem, sampling: Sampling, *, evaluation: bool = False) -> Generated:
        """Write completions for a problem. `evaluation` says who waits for them, for the wait clock."""
        prompt = self._renderer.render(problem)
        with nullcontext() if evaluation else self._pool.activity.group_waits(Cause.EMBED_WAIT):
            features, embedded = await self._embedders.embed(prompt, problem)
        completions = await self._pool.generate(prompt, sampling, features, evaluation=evaluation)
        return Generated(prompt, features, embedded, completions)

    def demonstration(self, problem: Problem) -> tuple[Prompt, tuple[int, ...]]:
        """A problem's prompt with the tokens that SFT imitates."""
        return self._renderer.render(problem), self._renderer.demonstration_ids(problem)

    async def embed(self, batch: Sequence[tuple[Prompt, Problem]]) -> list[FeaturesRef]:
        """Features for many prompts at once: a few references that together have all."""
        return await self._embedders.embed_many(batch)
