"""The metrics of one optimizer step, from everybody who knows something: groups, the learner, the ledger, the clock."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from actors.episodes import Generated
from actors.ports import StepReport
from rlsys.data.batches import BatchMaker
from rlsys.metrics import Metrics
from rlsys.models.vllm_plugin.options import EngineStats
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.lengths import LengthLog
from rlsys.pipeline.staleness import group_staleness
from rlsys.pipeline.waits import WaitClock
from rlsys.types import FinishReason, TrainSample, Trajectory, TrajectoryGroup


class StepMetrics(Metrics):
    """Collects from one flush to the next."""

    def __init__(self, buffer: TrajectoryBuffer, clock: WaitClock, lengths: LengthLog, batches: BatchMaker) -> None:
        super().__init__()
        self._buffer = buffer
        self._clock = clock
        self._lengths = lengths
        self._batches = batches

    def note_group(self, generated: Generated, group: TrajectoryGroup) -> None:
        """A group was finished, whatever becomes of it."""
        embedded = generated.embedded
        self.record("embed/hit_fraction", embedded.hits / max(1, embedded.hits + embedded.misses))
        self.record("embed/latency_seconds", embedded.seconds)
        self.record("group/constant_reward_fraction", float(self._batches.teaches_nothing(group)))
        self._lengths.generated([len(trajectory.completion.token_ids_T) for trajectory in group.trajectories])
        for trajectory in group.trajectories:
            self._note_trajectory(trajectory)

    def _note_trajectory(self, trajectory: Trajectory) -> None:
        completion, score = trajectory.completion, trajectory.score
        self.record("rollout/completion_tokens", len(completion.token_ids_T))
        self.record("rollout/completion_tokens_max", len(completion.token_ids_T))
        self.record("rollout/truncated_fraction", float(completion.finish_reason is FinishReason.LENGTH))
        self.record("rollout/non_finite_fraction", float(not completion.has_finite_logprobs))
        self.record("rollout/spanning_fraction", float(len(completion.version_spans) > 1))
        self.record("reward/failed_fraction", float(not score.is_valid))
        if score.is_valid:
            self.record("reward/total", score.reward)
            for name, part in score.parts.items():
                self.record(f"reward/{name}", part.value)

    def note_taken(self, group: TrajectoryGroup, learner_version: int) -> None:
        """The learner, at this version, begins to train on a group."""
        staleness = group_staleness(group, learner_version)
        self.record("staleness/mean", staleness.total)
        self.record("staleness/max", staleness.total)
        self.record("staleness/in_flight_mean", staleness.in_flight)
        self.record("staleness/in_queue_mean", staleness.in_queue)

    def note_engines(self, engines: Sequence[EngineStats]) -> None:
        """The engines' counters, since they started."""
        queries = sum(engine.prefix_cache_queries for engine in engines)
        hits = sum(engine.prefix_cache_hits for engine in engines)
        self.record("rollout/prefix_cache_hit_fraction", hits / max(1, queries))
        self.record("rollout/preemptions", sum(engine.preemptions for engine in engines))

    def end_step(self, report: StepReport, samples: Sequence[TrainSample]) -> dict[str, float]:
        """Return the metrics of the step that made `report`; the books must balance."""
        self.update(report.metrics)
        self.record("time/step_seconds", report.seconds)
        self.record("throughput/trained_trajectories", len(samples))
        for _, of_group in itertools.groupby(samples, key=lambda sample: sample.group):
            self._lengths.trained([len(sample.continuation_ids_T) for sample in of_group])
        self.update(self._lengths.end_step())
        self._buffer.ledger.check()
        self.update(self._buffer.ledger.metrics())
        self.record("group/buffer_depth", self._buffer.depth)
        self.update(self._clock.lap().metrics())
        return self.flush()
