"""The GRPO phase of a run: puts the controller together, and tells everybody about each of its steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from actors.checkpoint import GrpoState
from actors.controller import Controller, StepRecord
from actors.interleaved import InterleavedEvaluation
from actors.progress import count
from actors.roll_out import FRUITLESS_BATCHES, RollOut
from actors.session import Session
from actors.step_metrics import StepMetrics
from rlsys.config import Config
from rlsys.data.batches import BatchMaker
from rlsys.data.curriculum import Curriculum
from rlsys.data.cursor import ProblemCursor, ProblemSource
from rlsys.evaluation.accuracy import EvaluationResult
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.lengths import LengthLog
from rlsys.pipeline.staleness import make_policy
from rlsys.pipeline.waits import WaitTimes
from rlsys.report.alarms import Alarms
from rlsys.report.records import Phase, trajectory_record
from rlsys.rewards.failures import FailureGuard
from rlsys.types import Problem


@dataclass(frozen=True)
class _Phase:
    """What the phase keeps, and a checkpoint of it holds."""

    buffer: TrajectoryBuffer
    source: ProblemSource
    lengths: LengthLog
    alarms: Alarms

    def state(self) -> GrpoState:
        return GrpoState(self.buffer.snapshot(), self.source.state(), self.lengths.state(), self.alarms.state())


async def run_grpo(session: Session, state: GrpoState | None) -> None:
    """Train from `state` or from the first step."""
    config, learner = session.config.grpo, session.roles.learner
    phase = _begin(session, state)
    # Engines count versions of this phase from here on; nothing may be admitted before its weights are live.
    await session.roles.pool.load(await learner.publish())
    session.clock.lap()  # the first step's times begin here, and not with the run
    session.progress.begin(
        f"GRPO: {config.steps} steps of {config.groups_per_step} groups of {config.group_size}, "
        f"staleness at most {config.max_staleness}",
        learner.version,
    )
    await _controller(session, phase).run(config.steps, _Recorder(session, phase).after_step)


def _begin(session: Session, state: GrpoState | None) -> _Phase:
    config = session.config
    policy = make_policy(config.grpo.order, config.grpo.max_staleness, config.grpo.groups_per_step)
    source = problem_source(config, session.prepared.task.splits["train"])
    deadline = config.cluster.wait_timeout_seconds
    phase = _Phase(TrajectoryBuffer(policy, deadline_seconds=deadline), source, LengthLog(), Alarms(config))
    if state is not None:
        buffer = TrajectoryBuffer.restore(
            policy, state.buffer, session.roles.learner.version, deadline_seconds=deadline
        )
        phase = replace(phase, buffer=buffer)
        phase.source.restore(state.source)
        phase.lengths.restore(state.lengths)
        phase.alarms.restore(state.alarms)
    session.buffer, session.alarms = phase.buffer, phase.alarms.rung
    return phase


def problem_source(config: Config, problems: Sequence[Problem]) -> ProblemSource:
    """Where the problems of GRPO come from."""
    if config.grpo.curriculum is not None:
        return Curriculum(problems, config.grpo.curriculum, config.seed)
    return ProblemCursor(problems, config.seed, "grpo")


def _controller(session: Session, phase: _Phase) -> Controller:
    config, roles = session.config.grpo, session.roles
    batches = BatchMaker(config, session.config.rollout.max_new_tokens)
    metrics = StepMetrics(phase.buffer, session.clock, phase.lengths, batches)
    guard = FailureGuard(session.config.scoring.max_failed_fraction)

    def report(version: int, result: EvaluationResult) -> None:
        session.trackers.log_evaluation(version, result)
        session.progress.say(
            f"  version {version}: accuracy {result.accuracy:.3f}, greedy {result.greedy_accuracy:.3f} on {result.n} "
            "validation problems"
        )

    return Controller(
        config,
        roll_out=RollOut(
            session.sampling(config.group_size),
            episodes=session.episodes,
            scorers=roles.scorers,
            activity=roles.pool.activity,
            buffer=phase.buffer,
            source=phase.source,
            batches=batches,
            observers=[metrics.note_group, lambda _, group: guard.record(group.trajectories)],
            fruitless_groups=FRUITLESS_BATCHES * config.groups_per_step,
        ),
        learner=roles.learner,
        pool=roles.pool,
        episodes=session.episodes,
        buffer=phase.buffer,
        batches=batches,
        evaluation=InterleavedEvaluation(
            roles.pool,
            session.config.evaluation.every_steps,
            session.evaluate_interleaved,
            report,
            session.directory.evaluated_versions(Phase.GRPO),
        ),
        metrics=metrics,
        clock=session.clock,
        learner_ranks=session.config.learner.ranks,
    )


SHOWN_REWARDS = {"reward": "reward/total", "accuracy": "reward/answer"}


class _Recorder:
    """Tells everybody about each step: totals, metrics, trajectories, progress, alarms; and writes checkpoints."""

    def __init__(self, session: Session, phase: _Phase) -> None:
        self._session = session
        self._phase = phase
        self._last = time.monotonic()
        self._first_times = self._last_times = session.clock.totals()
        self._rewards: dict[str, float] = {}

    async def after_step(self, record: StepRecord) -> None:
        seconds, times = self._lap()
        session, step, metrics = self._session, record.report.version, record.metrics
        metrics["throughput/trajectories_per_second"] = metrics["throughput/trained_trajectories"] / seconds
        metrics["throughput/trained_tokens_per_second"] = record.report.tokens / seconds
        session.totals.add_step(metrics, seconds, times)
        metrics["time/grpo_seconds"] = session.totals.grpo_seconds
        session.trackers.log(Phase.GRPO, step, metrics)
        self._write_trajectories(record)
        self._tell(step, metrics, record.report.tokens / seconds, times)
        for alarm in self._phase.alarms.check(step, metrics):
            session.progress.say(f"  ALARM {alarm.name}: {alarm.message}")
        if step % session.config.checkpoint.every_steps == 0 or step == session.config.grpo.steps:
            await session.save(Phase.GRPO, self._phase.state())

    def _lap(self) -> tuple[float, WaitTimes]:
        now, times = time.monotonic(), self._session.clock.totals()
        seconds, waits = now - self._last, times - self._last_times
        self._session.bottleneck = (times - self._first_times).bottleneck()
        self._last, self._last_times = now, times
        return seconds, waits

    def _write_trajectories(self, record: StepRecord) -> None:
        number = self._session.config.logging.trajectories_per_step
        taken = [pair for part in record.parts for pair in zip(part.groups, part.advantages, strict=True)]
        self._session.directory.append_trajectories(
            Phase.GRPO,
            record.report.version,
            [trajectory_record(group, 0, float(advantages_G[0])) for group, advantages_G in taken[:number]],
        )

    def _tell(self, step: int, metrics: Mapping[str, float], tokens_per_second: float, times: WaitTimes) -> None:
        # No group may have been finished since the last step: the last known values stand.
        self._rewards.update({key: metrics[name] for key, name in SHOWN_REWARDS.items() if name in metrics})
        facts = {
            **{key: f"{value:.3f}" for key, value in self._rewards.items()},
            "staleness": f"{metrics['staleness/mean']:.2f}",
            "tokens/s": count(tokens_per_second),
        }
        self._session.progress.step("step", step, self._session.config.grpo.steps, facts, times.bottleneck())
