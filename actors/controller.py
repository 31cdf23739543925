"""The controller: two loops round the buffer. It owns the account of all groups, and computes nothing.

    roll out:  admit -> render -> embed -> generate -> score -> put          (one task a group)
    learn:     take_batch -> advantages -> step -> publish -> load, release  (the load overlaps the next step)

| loop | waits for | until | woken by |
|---|---|---|---|
| roll out | a slot | fewer than (S+1)·P groups hold one | `release` after a load; a dropped group |
| a group | its features, completions, scores | the role answers or its deadline runs out | the role |
| learn | the P oldest groups | all are scored | `put`; a drop that makes room for the next oldest |
| learn | the previous load | it is live on every worker | the workers |

Invariant: slots are returned only when the weights that were trained on the groups are live on every worker. Together
with admission in order this bounds the staleness exactly (`rlsys.pipeline.staleness`). A failing loop ends the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.episodes import Episodes, Generated
from actors.ports import FeaturesRef, Learner, Sampling, StepReport
from actors.rollout_pool import RolloutPool
from actors.scorer_pool import ScorerPool
from rlsys.algorithms.advantages import group_mean, group_normalized, is_constant, rewards_of
from rlsys.config import GrpoConfig
from rlsys.data.cursor import ProblemCursor
from rlsys.data.samples import group_samples, tokens_in_loss
from rlsys.errors import RewardError
from rlsys.metrics import Metrics
from rlsys.pipeline.buffer import Admission, TrajectoryBuffer
from rlsys.pipeline.ledger import DropReason
from rlsys.pipeline.staleness import group_staleness
from rlsys.pipeline.waits import Cause, Role, WaitClock
from rlsys.rewards.failures import FailureGuard
from rlsys.types import FinishReason, TrainSample, Trajectory, TrajectoryGroup

FRUITLESS_BATCHES = 20
"""Batches' worth of groups that may be dropped in a row before the run stops and says why."""


@dataclass(frozen=True)
class StepRecord:
    """What there is to tell about one optimizer step."""

    report: StepReport
    groups: Sequence[TrajectoryGroup]
    advantages: Sequence[NDArray[np.float64]]
    """Of each group, in order."""
    metrics: dict[str, float]


class Controller:
    """Runs GRPO from the learner's version up to a last one."""

    def __init__(
        self,
        config: GrpoConfig,
        sampling: Sampling,
        *,
        learner: Learner,
        pool: RolloutPool,
        episodes: Episodes,
        scorers: ScorerPool,
        buffer: TrajectoryBuffer,
        cursor: ProblemCursor,
        guard: FailureGuard,
        clock: WaitClock,
    ) -> None:
        self._config = config
        self._sampling = sampling
        self._learner = learner
        self._pool = pool
        self._episodes = episodes
        self._scorers = scorers
        self._buffer = buffer
        self._cursor = cursor
        self._guard = guard
        self._clock = clock
        self._features: dict[int, FeaturesRef] = {}
        self._metrics = Metrics()
        self._load: asyncio.Task[None] | None = None
        self._flights: set[asyncio.Task[None]] = set()
        self._dropped_in_a_row = 0

    async def run(self, last_version: int, after_step: Callable[[StepRecord], Awaitable[None]]) -> None:
        """Train until the learner holds `last_version` and its weights are live; await `after_step` after each step."""
        async with asyncio.TaskGroup() as tasks:
            rolling = tasks.create_task(self._roll_out(tasks))
            await self._learn(last_version, after_step)
            rolling.cancel()
            self._buffer.close("the last step is done")
            for task in tuple(self._flights):
                task.cancel()

    # ------------------------------------------------------------ roll out

    async def _roll_out(self, tasks: asyncio.TaskGroup) -> None:
        for admission in self._buffer.in_flight():  # a resumed run: the same problems under the same tickets
            self._take_off(tasks, admission)
        while True:
            self._take_off(tasks, await self._buffer.admit(self._cursor.next))

    def _take_off(self, tasks: asyncio.TaskGroup, admission: Admission) -> None:
        flight = tasks.create_task(self._roll_out_group(admission))
        self._flights.add(flight)
        flight.add_done_callback(self._flights.discard)

    async def _roll_out_group(self, admission: Admission) -> None:
        generated = await self._episodes.generate(admission.problem, self._sampling)
        scores = await self._scorers.score(admission.problem, [one.text for one in generated.completions])
        trajectories = tuple(map(Trajectory, generated.completions, scores))
        group = TrajectoryGroup(admission.ticket, admission.problem, generated.prompt, trajectories)
        self._note_group(generated, trajectories)
        self._guard.record(trajectories)
        reason = self._reason_to_drop(group)
        if reason is not None:
            self._buffer.drop(admission.ticket, reason, group.generated_tokens)
            self._note_dropped()
            return
        self._dropped_in_a_row = 0
        self._features[admission.ticket] = generated.features
        self._buffer.put(group)

    def _note_dropped(self) -> None:
        """Stop a run that can't learn: it would otherwise generate for ever without a single step."""
        self._dropped_in_a_row += 1
        limit = FRUITLESS_BATCHES * self._config.groups_per_step
        if self._dropped_in_a_row >= limit:
            raise RewardError(
                f"none of the last {limit} groups could be trained on: in each, all {self._config.group_size} rewards "
                "were equal, or could not be computed. The policy never succeeds, or always does.\n"
                "Train the warm start longer, reward steps on the way, raise grpo.group_size, or set "
                "grpo.filter_zero_variance=false"
            )

    def _reason_to_drop(self, group: TrajectoryGroup) -> DropReason | None:
        rewards_G = rewards_of(group)
        if np.isfinite(rewards_G).sum() < 2:
            return DropReason.FAILED
        if self._config.filter_zero_variance and is_constant(rewards_G):
            return DropReason.FILTERED
        return None

    def _note_group(self, generated: Generated, trajectories: Sequence[Trajectory]) -> None:
        note = self._metrics.record
        note(
            "embed/hit_fraction", generated.embedded.hits / max(1, generated.embedded.hits + generated.embedded.misses)
        )
        note("embed/latency_seconds", generated.embedded.seconds)
        rewards_G = np.array([trajectory.score.reward for trajectory in trajectories])
        note("group/constant_reward_fraction", float(is_constant(rewards_G)))
        for trajectory in trajectories:
            completion, score = trajectory.completion, trajectory.score
            note("rollout/completion_tokens", len(completion.token_ids_T))
            note("rollout/completion_tokens_max", len(completion.token_ids_T))
            note("rollout/truncated_fraction", float(completion.finish_reason is FinishReason.LENGTH))
            note("rollout/spanning_fraction", float(len(completion.version_spans) > 1))
            note("reward/failed_fraction", float(not score.is_valid))
            if score.is_valid:
                note("reward/total", score.reward)
                for name, part in score.parts.items():
                    note(f"reward/{name}", part.value)

    # ------------------------------------------------------------ learn

    async def _learn(self, last_version: int, after_step: Callable[[StepRecord], Awaitable[None]]) -> None:
        while self._learner.version < last_version:
            with self._clock.blocked(Role.LEARNER, Cause.GROUPS):
                groups = await self._buffer.take_batch(self._learner.version)
            for group in groups:
                self._note_staleness(group)
            advantages = [self._advantages(group) for group in groups]
            samples = [
                sample
                for group, advantages_G in zip(groups, advantages, strict=True)
                for sample in group_samples(group, advantages_G, mask_truncated=self._config.mask_truncated)
            ]
            features = await self._features_of(groups)
            with self._clock.busy(Role.LEARNER):
                report = await self._learner.step(samples, features)
            self._buffer.record_trained(tokens_in_loss(groups, samples))
            await self._publish([group.ticket for group in groups])
            await after_step(StepRecord(report, groups, advantages, self._step_metrics(report, samples)))
        await self._await_load()

    def _advantages(self, group: TrajectoryGroup) -> NDArray[np.float64]:
        rewards_G = rewards_of(group)
        return group_normalized(rewards_G) if self._config.normalise_advantages else group_mean(rewards_G)

    async def _features_of(self, groups: Sequence[TrajectoryGroup]) -> list[FeaturesRef]:
        """The references from the rollouts; groups that a checkpoint brought back are embedded again."""
        restored = [(group.prompt, group.problem) for group in groups if group.ticket not in self._features]
        kept = [self._features.pop(group.ticket) for group in groups if group.ticket in self._features]
        return kept + await self._episodes.embed(restored)

    async def _publish(self, tickets: Sequence[int]) -> None:
        """Write the weights; the workers load them while the learner goes on, and loads never overtake each other."""
        await self._await_load()
        started = time.monotonic()
        with self._clock.busy(Role.LEARNER):
            weights = await self._learner.publish()
        self._metrics.record("time/publish_seconds", time.monotonic() - started)

        async def load() -> None:
            self._metrics.record("time/weight_load_seconds", await self._pool.load(weights))
            self._buffer.release(tickets)

        self._load = asyncio.create_task(load())

    async def _await_load(self) -> None:
        if self._load is not None:
            with self._clock.blocked(Role.LEARNER, Cause.WEIGHT_LOAD):
                await self._load

    def _note_staleness(self, group: TrajectoryGroup) -> None:
        staleness = group_staleness(group, self._learner.version)
        self._metrics.record("staleness/mean", staleness.total)
        self._metrics.record("staleness/max", staleness.total)
        self._metrics.record("staleness/in_flight_mean", staleness.in_flight)
        self._metrics.record("staleness/in_queue_mean", staleness.in_queue)

    def _step_metrics(self, report: StepReport, samples: Sequence[TrainSample]) -> dict[str, float]:
        self._metrics.update(report.metrics)
        self._metrics.record("time/step_seconds", report.seconds)
        self._metrics.record("throughput/trained_trajectories", len(samples))
        self._buffer.ledger.check()
        self._metrics.update(self._buffer.ledger.metrics())
        self._metrics.record("group/buffer_depth", self._buffer.depth)
        self._metrics.update(self._clock.lap().metrics())
        return self._metrics.flush()
