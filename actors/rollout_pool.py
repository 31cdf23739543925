"""All rollout workers as one: the least loaded takes the next prompt, and all of them load each policy version."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from actors.ports import FeaturesRef, RolloutWorker, Sampling
from actors.rollout_activity import RolloutActivity
from rlsys.pipeline.waits import WaitClock
from rlsys.types import Completion, Prompt

if TYPE_CHECKING:
    from rlsys.models.vllm_plugin.options import EngineStats
    from rlsys.models.weights import WeightFile

STOP_SECONDS = 30.0
"""How long an engine may take to end by itself; after that its process is ended from outside."""


class RolloutPool:
    """Dispatches prompts over workers."""

    def __init__(self, workers: Sequence[RolloutWorker], clock: WaitClock) -> None:
        self.activity = RolloutActivity(clock, len(workers))
        self._workers = workers
        self._prompts = [0] * len(workers)
        self._may_load = asyncio.Event()
        self._may_load.set()

    async def generate(
        self, prompt: Prompt, sampling: Sampling, features: FeaturesRef, *, evaluation: bool = False
    ) -> tuple[Completion, ...]:
        """All completions of one prompt, from the worker that has the fewest prompts."""
        number = min(range(len(self._workers)), key=self._prompts.__getitem__)
        self._prompts[number] += 1
        try:
            with self.activity.writing(number, evaluation=evaluation):
                return await self._workers[number].generate(prompt, sampling, features)
        finally:
            self._prompts[number] -= 1

    @contextmanager
    def holding_loads(self) -> Generator[None]:
        """Around an evaluation: no worker changes its version inside. Who loads waits in `may_load` first."""
        assert self._may_load.is_set(), "one evaluation at a time"
        self._may_load.clear()
        try:
            yield
        finally:
            self._may_load.set()

    async def may_load(self) -> None:
        """Wait until no evaluation holds loads."""
        if not self._may_load.is_set():
            with self.activity.held():
                await self._may_load.wait()

    async def load(self, weights: WeightFile) -> float:
        """Make the weights live on every worker; returns the slowest's seconds."""
        assert self._may_load.is_set(), "a load changes the version of an evaluation that is under way"
        return max(await asyncio.gather(*(self._load(number, weights) for number in range(len(self._workers)))))

    async def _load(self, number: int, weights: WeightFile) -> float:
        with self.activity.loading(number):
            return await self._workers[number].load(weights)

    async def stats(self) -> list[EngineStats]:
        """The counters of each engine."""
        return list(await asyncio.gather(*(worker.stats() for worker in self._workers)))

    async def stop(self) -> None:
        """End all engines that still answer. Never raises what a worker raises: an error on the way out would hide
        the one that ended the run, and processes that are left are ended with the cluster.
        """
        stops = (asyncio.wait_for(worker.stop(), STOP_SECONDS) for worker in self._workers)
        await asyncio.gather(*stops, return_exceptions=True)
