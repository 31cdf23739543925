"""The controller: two loops round the buffer. It owns the account of all groups, and computes nothing.

    roll out:  admit -> render -> embed -> generate -> score -> put          (`actors.roll_out`)
    learn:     take -> accumulate, until a step is full -> step -> publish -> load, release

The load overlaps the next step. With streaming, `take` gives the first groups of a step while others are still being
generated; otherwise it waits for all of them, and a step is accumulated at once.

| the learn loop waits for | until | woken by |
|---|---|---|
| groups of the step | the buffer hands them out | `put`; a drop that makes room for the next oldest |
| the previous load | no evaluation holds it back, and it is live on every worker | the evaluation, the workers |

What goes on beside the two loops (loads, evaluations, every group's rollout) are tasks of one group with them: the
first error, whoever has it, ends them all at once and is the error of the run. Besides these waits there are only calls
of roles, each of which has a deadline of its own.

Invariant: slots are returned only when the weights that were trained on the groups are live on every worker. Together
with admission in order this bounds the staleness exactly (`rlsys.pipeline.staleness`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from actors.episodes import Episodes
from actors.interleaved import InterleavedEvaluation
from actors.mismatch_probe import MismatchProbe
from actors.ports import FeaturesRef, Learner, StepReport
from actors.roll_out import RollOut
from actors.rollout_pool import RolloutPool
from actors.step_metrics import StepMetrics
from rlsys.config_grpo import GrpoConfig
from rlsys.data.batches import Batch, BatchMaker
from rlsys.data.samples import tokens_in_loss
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.waits import Cause, Role, WaitClock
from rlsys.types import TrajectoryGroup


@dataclass(frozen=True)
class StepRecord:
    """What there is to tell about one optimizer step."""

    report: StepReport
    parts: Sequence[Batch]
    """The step's groups as the learner took them; one part unless the step was streamed."""
    metrics: dict[str, float]


AfterStep = Callable[[StepRecord], Awaitable[None]]


class Controller:
    """Runs GRPO from the learner's version up to a last one."""

    def __init__(
        self,
        config: GrpoConfig,
        *,
        roll_out: RollOut,
        learner: Learner,
        pool: RolloutPool,
        episodes: Episodes,
        buffer: TrajectoryBuffer,
        batches: BatchMaker,
        evaluation: InterleavedEvaluation,
        metrics: StepMetrics,
        clock: WaitClock,
        learner_ranks: int = 1,
    ) -> None:
        """A streamed step is taken `learner_ranks` groups at a time at least, so that no rank is without one."""
        self._groups_per_step = config.groups_per_step
        self._streams = config.streaming
        self._learner_ranks = learner_ranks
        self._roll_out = roll_out
        self._learner = learner
        self._pool = pool
        self._episodes = episodes
        self._buffer = buffer
        self._batches = batches
        self._evaluation = evaluation
        self._metrics = metrics
        self._clock = clock
        self._probe = MismatchProbe(learner, buffer, batches, roll_out.features)
        self._load: tuple[asyncio.Task[None], asyncio.Task[None]] | None = None
        """The newest load: until it may begin, and until it is live."""

    async def run(self, last_version: int, after_step: AfterStep) -> None:
        """Train until the learner holds `last_version` and its weights are live; await `after_step` after each step."""
        async with asyncio.TaskGroup() as tasks:
            self._evaluation.begin(self._learner.version, tasks)
            rolling = tasks.create_task(self._roll_out.run(tasks))
            while self._learner.version < last_version:
                await after_step(await self._learn(tasks))
            await self._await_load()
            with self._clock.blocked(Role.LEARNER, Cause.EVALUATION):
                await self._evaluation.finish()
            rolling.cancel()
            self._buffer.close("the last step is done")
            self._roll_out.cancel()

    async def _learn(self, tasks: asyncio.TaskGroup) -> StepRecord:
        """One optimizer step, and the publication of its weights."""
        parts: list[Batch] = []
        taken = 0
        while taken < self._groups_per_step:
            with self._clock.blocked(Role.LEARNER, Cause.GROUPS):
                groups = await self._take()
            taken += len(groups)
            parts.append(await self._accumulate(groups))
        groups = [group for part in parts for group in part.groups]
        with self._clock.busy(Role.LEARNER):
            await self._probe.run(groups)
            report = await self._learner.step()
        samples = [sample for part in parts for sample in part.samples]
        self._buffer.record_trained(tokens_in_loss(groups, samples))
        self._roll_out.forget_dropped()
        await self._publish([group.ticket for group in groups], tasks)
        return StepRecord(report, parts, self._metrics.end_step(report, samples))

    async def _take(self) -> list[TrajectoryGroup]:
        if self._streams:
            return await self._buffer.take_next(self._learner.version, at_least=self._learner_ranks)
        return await self._buffer.take_batch(self._learner.version)

    async def _accumulate(self, groups: Sequence[TrajectoryGroup]) -> Batch:
        for group in groups:
            self._metrics.note_taken(group, self._learner.version)
        batch = self._batches.make(groups)
        features = await self._features_of(groups)
        with self._clock.busy(Role.LEARNER):
            await self._learner.accumulate(batch.samples, features)
        return batch

    async def _features_of(self, groups: Sequence[TrajectoryGroup]) -> list[FeaturesRef]:
        """The references from the rollouts; groups that a checkpoint brought back are embedded again."""
        known = self._roll_out.features
        restored = [(group.prompt, group.problem) for group in groups if group.ticket not in known]
        kept = [known.pop(group.ticket) for group in groups if group.ticket in known]
        return kept + await self._episodes.embed(restored)

    async def _publish(self, tickets: Sequence[int], tasks: asyncio.TaskGroup) -> None:
        """Write the weights; the workers load them while the learner goes on, and loads never overtake each other."""
        await self._await_load()
        started = time.monotonic()
        with self._clock.busy(Role.LEARNER):
            weights = await self._learner.publish()
        self._metrics.record("time/publish_seconds", time.monotonic() - started)

        may_load = tasks.create_task(self._pool.may_load())

        async def load() -> None:
            await may_load
            self._metrics.record("time/weight_load_seconds", await self._pool.load(weights))
            self._buffer.release(tickets)
            self._evaluation.begin(weights.version, tasks)
            self._metrics.note_engines(await self._pool.stats())

        self._load = may_load, tasks.create_task(load())

    async def _await_load(self) -> None:
        if self._load is not None:
            may_load, load = self._load
            with self._clock.blocked(Role.LEARNER, Cause.EVALUATION):
                await may_load
            with self._clock.blocked(Role.LEARNER, Cause.WEIGHT_LOAD):
                await load
