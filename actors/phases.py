"""The two training phases of a run, each from its resumed or first step to its last."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from actors.checkpoint import RunState
from actors.controller import Controller, StepRecord
from actors.ports import StepReport
from actors.progress import count
from actors.session import Session
from actors.warm_start import WarmStart
from rlsys.data.cursor import ProblemCursor
from rlsys.models.vllm_plugin.options import EngineStats
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.staleness import StrictStaleness
from rlsys.pipeline.waits import WaitTimes
from rlsys.report.records import Phase, trajectory_record
from rlsys.rewards.failures import FailureGuard


async def run_sft(session: Session) -> None:
    """The warm start, from the learner's version on."""
    config, learner = session.config.sft, session.roles.learner
    assert config is not None, "there is a warm start"
    steps = config.steps
    session.progress.begin(f"SFT warm start: {steps} steps of {config.batch_size} demonstrations", learner.version)

    async def after_step(report: StepReport) -> None:
        session.trackers.log(Phase.SFT, report.version, {**report.metrics, "time/step_seconds": report.seconds})
        session.progress.step(
            "step",
            report.version,
            steps,
            {"loss": f"{report.metrics['train/loss']:.3f}", "tokens/s": count(report.tokens / report.seconds)},
        )
        if report.version % session.config.checkpoint.every_steps == 0 and report.version < steps:
            await session.save(Phase.SFT, cursor_position=0, buffer=None)

    problems = session.prepared.task.splits["train"]
    await WarmStart(config, learner, session.episodes, problems, session.config.seed).run(steps, after_step)


async def run_grpo(session: Session, state: RunState | None) -> None:
    """Asynchronous GRPO, from `state` or from the first step."""
    config, learner = session.config.grpo, session.roles.learner
    policy = StrictStaleness(config.max_staleness, config.groups_per_step)
    buffer = TrajectoryBuffer(policy)
    cursor = ProblemCursor(session.prepared.task.splits["train"], session.config.seed)
    if state is not None and state.buffer is not None:
        buffer = TrajectoryBuffer.restore(policy, state.buffer, learner.version)
        cursor.position = state.cursor_position
    session.buffer = buffer
    # Engines count versions of this phase from here on; nothing may be admitted before its weights are live.
    await session.roles.pool.load(await learner.publish())
    session.progress.begin(
        f"GRPO: {config.steps} steps of {config.groups_per_step} groups of {config.group_size}, "
        f"staleness at most {config.max_staleness}",
        learner.version,
    )
    recorder = _Recorder(session, buffer, cursor)
    controller = Controller(
        config,
        session.sampling(config.group_size),
        learner=learner,
        pool=session.roles.pool,
        episodes=session.episodes,
        scorers=session.roles.scorers,
        buffer=buffer,
        cursor=cursor,
        guard=FailureGuard(session.config.scoring.max_failed_fraction),
        clock=session.clock,
    )
    await controller.run(config.steps, recorder.after_step)


def _engine_metrics(engines: Sequence[EngineStats]) -> dict[str, float]:
    queries = sum(engine.prefix_cache_queries for engine in engines)
    return {
        "rollout/prefix_cache_hit_fraction": sum(engine.prefix_cache_hits for engine in engines) / max(1, queries),
        "rollout/preemptions": sum(engine.preemptions for engine in engines),
    }


SHOWN_REWARDS = {"reward": "reward/total", "accuracy": "reward/answer"}


class _Recorder:
    """Tells everybody about each step: totals, metrics, trajectories, progress; and writes checkpoints."""

    def __init__(self, session: Session, buffer: TrajectoryBuffer, cursor: ProblemCursor) -> None:
        self._session = session
        self._buffer = buffer
        self._cursor = cursor
        self._last = time.monotonic()
        self._last_times = session.clock.totals()
        self._rewards: dict[str, float] = {}

    async def after_step(self, record: StepRecord) -> None:
        seconds, times = self._lap()
        session, step, metrics = self._session, record.report.version, record.metrics
        metrics["throughput/trajectories_per_second"] = metrics["throughput/trained_trajectories"] / seconds
        metrics["throughput/trained_tokens_per_second"] = record.report.tokens / seconds
        metrics |= _engine_metrics(await session.roles.pool.stats())
        session.totals.add_step(metrics, seconds, times)
        session.trackers.log(Phase.GRPO, step, metrics)
        self._write_trajectories(record)
        self._tell(step, metrics, record.report.tokens / seconds, times)
        if step % session.config.checkpoint.every_steps == 0 or step == session.config.grpo.steps:
            await session.save(Phase.GRPO, self._cursor.position, self._buffer)

    def _lap(self) -> tuple[float, WaitTimes]:
        now, times = time.monotonic(), self._session.clock.totals()
        seconds, waits = now - self._last, times - self._last_times
        self._last, self._last_times = now, times
        return seconds, waits

    def _write_trajectories(self, record: StepRecord) -> None:
        number = self._session.config.logging.trajectories_per_step
        chosen = list(zip(record.groups, record.advantages, strict=True))[:number]
        self._session.directory.append_trajectories(
            Phase.GRPO,
            record.report.version,
            [trajectory_record(group, 0, float(advantages_G[0])) for group, advantages_G in chosen],
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
