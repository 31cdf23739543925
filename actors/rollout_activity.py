"""What every rollout worker is doing at this moment, told to the wait clock.

Whoever takes part in a rollout opens a context around its part; from all of them follows what each worker does: it
loads weights, writes training completions, or is idle, and then the cause is what the next group waits for. Idle and
held back are told apart from work: a worker that writes nothing but an evaluation while the next weights wait for that
evaluation is blocked by it, however much it writes.

Invariant: each worker is busy or blocked by exactly one cause, from the beginning on; a lost one is neither.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from rlsys.pipeline.waits import Cause, Role, WaitClock


class _Worker:
    def __init__(self) -> None:
        self.training_prompts = 0
        self.evaluation_prompts = 0
        self.is_loading = False
        self.doing: Cause | str | None = None
        self.interval = ExitStack()


class RolloutActivity:
    """Of `workers` workers, numbered from 0."""

    def __init__(self, clock: WaitClock, workers: int) -> None:
        self._clock = clock
        self._workers = {number: _Worker() for number in range(workers)}
        self._waiting_groups = {Cause.EMBED_WAIT: 0, Cause.REWARD_WAIT: 0}
        self._is_held = False
        self._note()

    @contextmanager
    def group_waits(self, cause: Cause) -> Generator[None]:
        """Around the time in which an admitted group waits for its features, or a written one for its scores."""
        self._waiting_groups[cause] += 1
        self._note()
        try:
            yield
        finally:
            self._waiting_groups[cause] -= 1
            self._note()

    @contextmanager
    def writing(self, number: int, *, evaluation: bool) -> Generator[None]:
        """Around the time in which worker `number` writes the completions of one prompt."""
        worker = self._workers[number]  # the same at the end, also where another worker has its number then
        worker.evaluation_prompts += evaluation
        worker.training_prompts += not evaluation
        self._note()
        try:
            yield
        finally:
            worker.evaluation_prompts -= evaluation
            worker.training_prompts -= not evaluation
            self._note()

    @contextmanager
    def loading(self, number: int) -> Generator[None]:
        """Around a weight load of worker `number`."""
        worker = self._workers[number]
        worker.is_loading = True
        self._note()
        try:
            yield
        finally:
            worker.is_loading = False
            self._note()

    @contextmanager
    def held(self) -> Generator[None]:
        """Around the time in which weights wait for the end of an evaluation."""
        self._is_held = True
        self._note()
        try:
            yield
        finally:
            self._is_held = False
            self._note()

    def lose(self, number: int) -> None:
        """Worker `number` is gone: its time is nobody's from here on."""
        self._workers.pop(number).interval.close()
        self._clock.set_members(Role.ROLLOUT_WORKER, len(self._workers))

    def take_back(self, number: int) -> None:
        """Another worker serves under `number`."""
        self._workers[number] = _Worker()
        self._clock.set_members(Role.ROLLOUT_WORKER, len(self._workers))
        self._note()

    def _doing(self, worker: _Worker) -> Cause | str:
        if worker.is_loading:
            return Cause.WEIGHT_LOAD
        if worker.training_prompts:
            return "busy"
        if self._waiting_groups[Cause.EMBED_WAIT]:
            return Cause.EMBED_WAIT
        if self._is_held:
            return Cause.EVALUATION
        if worker.evaluation_prompts:
            return "busy"
        return Cause.REWARD_WAIT if self._waiting_groups[Cause.REWARD_WAIT] else Cause.STALENESS_GATE

    def _note(self) -> None:
        """Tell the clock where a worker's state changed."""
        for worker in self._workers.values():
            doing = self._doing(worker)
            if doing == worker.doing:
                continue
            worker.interval.close()
            worker.doing = doing
            if isinstance(doing, Cause):
                worker.interval.enter_context(self._clock.blocked(Role.ROLLOUT_WORKER, doing))
            else:
                worker.interval.enter_context(self._clock.busy(Role.ROLLOUT_WORKER))
