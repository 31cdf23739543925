"""All rollout workers as one: the least loaded takes the next prompt, and all of them load each policy version.

Says at every moment what each worker is doing, to the wait clock: busy while it has a prompt, loading, or idle with a
cause. The cause of idleness is that of the group that would have come next: its features are still on the way, or it
was not admitted because the buffer is full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from actors.ports import FeaturesRef, RolloutWorker, Sampling
from rlsys.pipeline.waits import Cause, Role, WaitClock
from rlsys.types import Completion, Prompt

if TYPE_CHECKING:
    from rlsys.models.vllm_plugin.options import EngineStats
    from rlsys.models.weights import WeightFile


class _Member:
    """One worker, with what it is doing now."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker
        self.prompts = 0
        self.is_loading = False
        self.is_held = False
        self.doing: Cause | str | None = None
        self.interval = ExitStack()


class RolloutPool:
    """Dispatches prompts over workers."""

    def __init__(self, workers: Sequence[RolloutWorker], clock: WaitClock) -> None:
        self._members = [_Member(worker) for worker in workers]
        self._clock = clock
        self._preparing = 0
        self._may_load = asyncio.Event()
        self._may_load.set()
        self._note()

    async def generate(self, prompt: Prompt, sampling: Sampling, features: FeaturesRef) -> tuple[Completion, ...]:
        """All completions of one prompt, from the worker that has the fewest prompts."""
        member = min(self._members, key=lambda one: one.prompts)
        member.prompts += 1
        self._note()
        try:
            return await member.worker.generate(prompt, sampling, features)
        finally:
            member.prompts -= 1
            self._note()

    @contextmanager
    def preparing(self) -> Generator[None]:
        """Around the time in which an admitted group waits for its features."""
        self._preparing += 1
        self._note()
        try:
            yield
        finally:
            self._preparing -= 1
            self._note()

    @contextmanager
    def holding_loads(self) -> Generator[None]:
        """Around an evaluation: no worker changes its version inside. Loads wait for the end of it."""
        assert self._may_load.is_set(), "one evaluation at a time"
        self._may_load.clear()
        try:
            yield
        finally:
            self._may_load.set()

    async def load(self, weights: WeightFile) -> float:
        """Make the weights live on every worker; returns the slowest's seconds, those of a held load left out."""
        self._hold(not self._may_load.is_set())
        try:
            await self._may_load.wait()
        finally:
            self._hold(False)
        return max(await asyncio.gather(*(self._load(member, weights) for member in self._members)))

    async def _load(self, member: _Member, weights: WeightFile) -> float:
        member.is_loading = True
        self._note()
        try:
            return await member.worker.load(weights)
        finally:
            member.is_loading = False
            self._note()

    def _hold(self, is_held: bool) -> None:
        for member in self._members:
            member.is_held = is_held
        self._note()

    async def stats(self) -> list[EngineStats]:
        """The counters of each engine."""
        return list(await asyncio.gather(*(member.worker.stats() for member in self._members)))

    async def stop(self) -> None:
        """End all engines."""
        await asyncio.gather(*(member.worker.stop() for member in self._members))

    def _note(self) -> None:
        """Tell the clock where a worker's state changed."""
        for member in self._members:
            if member.is_loading:
                doing: Cause | str = Cause.WEIGHT_LOAD
            elif member.prompts:
                doing = "busy"
            elif member.is_held:
                doing = Cause.EVALUATION
            else:
                doing = Cause.EMBED_WAIT if self._preparing else Cause.STALENESS_GATE
            if doing == member.doing:
                continue
            member.interval.close()
            member.doing = doing
            if isinstance(doing, Cause):
                member.interval.enter_context(self._clock.blocked(Role.ROLLOUT_WORKER, doing))
            else:
                member.interval.enter_context(self._clock.busy(Role.ROLLOUT_WORKER))
