"""All replicas of the embedding service as one: each sequence has its replica, which so caches it once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from actors.ports import EmbeddingService, EmbedReport, FeaturesRef
from rlsys.pipeline.waits import Role, WaitClock
from rlsys.types import Problem, Prompt


class EmbedderPool:
    """Sends prompts to their replicas. A replica counts as busy while it has a request."""

    def __init__(self, replicas: Sequence[EmbeddingService], clock: WaitClock) -> None:
        self._replicas = replicas
        self._clock = clock
        self._requests = [0] * len(replicas)
        self._intervals = [ExitStack() for _ in replicas]

    async def embed(self, prompt: Prompt, problem: Problem) -> tuple[FeaturesRef, EmbedReport]:
        """Features of one prompt's sequences, by slot key."""
        return await self._ask(self._replica(prompt), _sequences(prompt, problem))

    async def embed_many(self, batch: Sequence[tuple[Prompt, Problem]]) -> list[FeaturesRef]:
        """Features for many prompts at once: one reference for each replica that has some of them."""
        sequences: defaultdict[int, dict[str, str]] = defaultdict(dict)
        for prompt, problem in batch:
            sequences[self._replica(prompt)] |= _sequences(prompt, problem)
        answers = await asyncio.gather(*(self._ask(replica, wanted) for replica, wanted in sequences.items()))
        return [features for features, _ in answers]

    async def _ask(self, replica: int, sequences: Mapping[str, str]) -> tuple[FeaturesRef, EmbedReport]:
        if not self._requests[replica]:
            self._intervals[replica].enter_context(self._clock.busy(Role.EMBEDDING_SERVICE))
        self._requests[replica] += 1
        try:
            return await self._replicas[replica].embed(sequences)
        finally:
            self._requests[replica] -= 1
            if not self._requests[replica]:
                self._intervals[replica].close()

    def _replica(self, prompt: Prompt) -> int:
        """The same one for a sequence every time."""
        return sum(prompt.slots[0].key.encode()) % len(self._replicas) if prompt.slots else 0


def _sequences(prompt: Prompt, problem: Problem) -> dict[str, str]:
    return {slot.key: sequence for slot, sequence in zip(prompt.slots, problem.dna, strict=True)}
