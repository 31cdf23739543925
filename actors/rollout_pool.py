"""All rollout workers as one: the least loaded takes the next prompt, and all of them load each policy version.

A worker whose process is gone, or does not answer within its deadline, is lost: nothing waits for it any more. Its
prompts are written anew by the others under the same tickets, and another worker takes its place, which serves nothing
before it holds the version that the others hold. That keeps the staleness bound (`rlsys.pipeline.staleness`, step 1).
Where no worker is left and none will come back, the error of the last one ends the run.

| waits | for | until | woken by |
|---|---|---|---|
| `generate` | a worker, where all are lost | a replacement serves, or could not be made | its task |
| `may_load` | an evaluation, which is of one version | its last completion is written | `holding_loads` |
| `load` | a replacement that is loading | it holds the version before | its task |
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from actors.ports import FeaturesRef, RolloutWorker, Sampling
from actors.rollout_activity import RolloutActivity
from rlsys.errors import RlsysError, RoleLostError
from rlsys.pipeline.waits import WaitClock
from rlsys.types import Completion, Prompt

if TYPE_CHECKING:
    from rlsys.models.vllm_plugin.options import EngineStats
    from rlsys.models.weights import WeightFile

T = TypeVar("T")

STOP_SECONDS = 30.0
"""How long an engine may take to end by itself; after that its process is ended from outside."""

Replace = Callable[[RolloutWorker], Awaitable[RolloutWorker]]
"""Ends a worker, if it is still there, whatever it is doing, and starts another."""


class RolloutPool:
    """Dispatches prompts over workers."""

    def __init__(
        self,
        workers: Sequence[RolloutWorker],
        clock: WaitClock,
        replace: Replace | None = None,
        *,
        most_replacements: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Over its life, `most_replacements` lost workers are replaced; `say` hears of each loss."""
        self.activity = RolloutActivity(clock, len(workers))
        self._workers: dict[int, RolloutWorker] = dict(enumerate(workers))
        """Those that serve, by number."""
        self._prompts = [0] * len(workers)
        self._replace = replace
        self._replacements_left = most_replacements if replace is not None else 0
        self._replacing: set[asyncio.Task[None]] = set()
        self._say = say
        self._last_loss: RoleLostError | None = None
        self._latest: WeightFile | None = None
        self._loading = asyncio.Lock()
        self._may_load = asyncio.Event()
        self._may_load.set()

    async def generate(
        self, prompt: Prompt, sampling: Sampling, features: FeaturesRef, *, evaluation: bool = False
    ) -> tuple[Completion, ...]:
        """All completions of one prompt, from the worker that has the fewest prompts."""
        while True:
            await self._someone()
            number = min(self._workers, key=self._prompts.__getitem__)
            worker = self._workers[number]
            self._prompts[number] += 1
            try:
                with self.activity.writing(number, evaluation=evaluation):
                    return await worker.generate(prompt, sampling, features)
            except RoleLostError as error:
                self._lose(number, worker, error)
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
        """Make the weights live on every worker that serves; returns the slowest's seconds."""
        assert self._may_load.is_set(), "a load changes the version of an evaluation that is under way"

        async def load(number: int, worker: RolloutWorker) -> float:
            with self.activity.loading(number):
                return await worker.load(weights)

        async with self._loading:
            self._latest = weights
            return max(await self._on_all(load), default=0.0)

    async def stats(self) -> list[EngineStats]:
        """The counters of each engine."""
        return await self._on_all(lambda number, worker: worker.stats())

    async def stop(self) -> None:
        """End all engines that still answer. Never raises what a worker raises: an error on the way out would hide
        the one that ended the run, and processes that are left are ended with the cluster.
        """
        for task in self._replacing:
            task.cancel()
        stops = [asyncio.wait_for(worker.stop(), STOP_SECONDS) for worker in self._workers.values()]
        await asyncio.gather(*stops, *self._replacing, return_exceptions=True)

    async def _on_all(self, call: Callable[[int, RolloutWorker], Awaitable[T]]) -> list[T]:
        """What the workers answer that are not lost meanwhile."""

        async def one(number: int, worker: RolloutWorker) -> list[T]:
            if self._workers.get(number) is not worker:
                return []  # lost before its turn came
            try:
                return [await call(number, worker)]
            except RoleLostError as error:
                self._lose(number, worker, error)
                return []

        answers = await asyncio.gather(*(one(number, worker) for number, worker in self._workers.items()))
        return [answer for answered in answers for answer in answered]

    def _lose(self, number: int, worker: RolloutWorker, error: RoleLostError) -> None:
        """Take a worker out; all who were waiting for it come here, the first one sees to its replacement."""
        if self._workers.get(number) is not worker:
            return
        del self._workers[number]
        self._last_loss = error
        self.activity.lose(number)
        self._say(f"  LOST {error}\n  {len(self._workers)} rollout workers go on.")
        if self._replace is not None and self._replacements_left:
            task = asyncio.create_task(self._take_back(number, worker, self._replace))
            self._replacing.add(task)
            task.add_done_callback(self._replacing.discard)

    async def _take_back(self, number: int, lost: RolloutWorker, replace: Replace) -> None:
        """Start another worker, and let it serve as soon as it holds what the others hold."""
        while self._replacements_left:
            self._replacements_left -= 1
            try:
                lost = worker = await replace(lost)
                async with self._loading:
                    if self._latest is not None:
                        await worker.load(self._latest)
                    self._workers[number] = worker
            except RlsysError as error:
                self._say(f"  Another worker could not take its place: {error}")
            else:
                self.activity.take_back(number)
                self._say("  Another worker has taken its place.")
                return

    async def _someone(self) -> None:
        """Wait until a worker serves; raises the error of the last one where none will."""
        while not self._workers:
            if not self._replacing:
                assert self._last_loss is not None, "a pool begins with workers"
                raise self._last_loss
            await asyncio.wait(self._replacing, return_when=asyncio.FIRST_COMPLETED)
