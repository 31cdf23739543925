"""rlsys on workload W, all of it: Ray, vLLM, DeepSpeed and the controller, as `rlsys train` runs them.

A core for the learner, and one for everything else: the engine, and the controller, scorers, embedding service and Ray,
which need little. The configuration offers no cores, so processes are pinned from outside: this one before Ray starts,
so that all that follow inherit it, and then the learner's.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rlsys.config import Config
from rlsys.pipeline.waits import Role, WaitTimes
from tests.benchmarks.measured import Measured, pin, two_cores
from tests.benchmarks.workload import (
    GROUP_SIZE,
    LEARNING_RATE,
    MAX_MODEL_TOKENS,
    MAX_NEW_TOKENS,
    PROMPTS_PER_STEP,
    TRAJECTORIES_PER_STEP,
    WordRenderer,
    make_text_model,
    problems,
)

ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
"""For the process of a part. vLLM would pin its threads itself, to cores that it takes for free."""


def configuration(work: Path, steps: int, *, staleness: int = 1, streaming: bool = False) -> Config:
    """W as a user would write it down."""
    return Config.model_validate(
        {
            "name": "w",
            # A run needs a task; W's problems take its place when the run is put together.
            "task": {"kind": "variant_consequence"},
            "policy": {"kind": "pretrained", "path": str(make_text_model(work / "text"))},
            "encoder": {"kind": "tiny"},
            "grpo": {
                "steps": steps,
                "groups_per_step": PROMPTS_PER_STEP,
                "group_size": GROUP_SIZE,
                "max_staleness": staleness,
                "streaming": streaming,
                "learning_rate": LEARNING_RATE,
            }
            # A step that is streamed must not need the whole step for its weights.
            | ({"aggregation": "constant"} if streaming else {}),
            "rewards": {"even": {"kind": "function", "function": "tests.benchmarks.workload:even_words"}},
            "learner": {"cpus": 1},
            "rollout": {
                "cpus": 1,
                "max_new_tokens": MAX_NEW_TOKENS,
                "max_model_tokens": MAX_MODEL_TOKENS,
                "max_running": TRAJECTORIES_PER_STEP,
            },
            "embedding": {"cpus": 0.1},
            "scoring": {"cpus": 0.1},
            "checkpoint": {"every_steps": 10**9},
            "cluster": {"dashboard": False},
        }
    )


@dataclass(frozen=True)
class _Moment:
    """The end of one step."""

    seconds: float
    times: WaitTimes
    metrics: Mapping[str, float]


def run_system(work: Path, steps: int, warmup: int, *, staleness: int, streaming: bool) -> Measured:
    """GRPO on W by the real roles; the figures are those that the run records about itself."""
    learner_core, other_core = two_cores()
    os.sched_setaffinity(0, {other_core})
    config = configuration(work, steps + warmup, staleness=staleness, streaming=streaming)
    moments = asyncio.run(_train(config, work, learner_core))
    return _measured(moments[warmup - 1 :])


async def _train(config: Config, work: Path, learner_core: int) -> list[_Moment]:
    """What `actors.run` does, with W's problems and renderer in place of a task's."""
    from actors.checkpoint import Checkpoints
    from actors.cluster import Cluster
    from actors.episodes import Episodes
    from actors.grpo_phase import run_grpo
    from actors.models import encoder_factory, policy_directory, quieten_libraries
    from actors.progress import Progress
    from actors.roles import Placement, demands, members
    from actors.session import Prepared, Session
    from actors.trackers import Trackers
    from rlsys.pipeline.waits import WaitClock
    from rlsys.report.records import Phase, RunDirectory
    from rlsys.tasks.loading import TaskData

    moments: list[_Moment] = []

    class Listener(Trackers):
        def log(self, phase: Phase, step: int, metrics: Mapping[str, float]) -> None:
            super().log(phase, step, metrics)
            moments.append(_Moment(time.monotonic(), clock.totals(), dict(metrics)))

    quieten_libraries()
    directory = RunDirectory.create(work / f"run-{os.getpid()}", config)
    factory = encoder_factory(config, work / "models")
    model = policy_directory(config, work / "models", factory, texts=())
    train = problems(PROMPTS_PER_STEP * (config.grpo.steps + config.grpo.max_staleness + 1))
    task = TaskData({"train": train, "validation": train, "test": train}, lambda _: 0.0, "error", {})
    renderer: Any = WordRenderer()
    prepared = Prepared(task, renderer, model, factory, pad_token_id=0)
    clock = WaitClock(time.monotonic, members(config))
    cpus = sum(one.processes * one.each.cpus for one in demands(config))
    with (directory.path / "progress.log").open("w") as log:
        progress = Progress(log)
        async with Cluster(config.cluster, cpus, 0, None) as cluster:
            with Placement(cluster, config, model, factory) as placement:
                roles = await placement.all_roles(clock, prepared.pad_token_id)
                _pin_learner(learner_core)
                trackers = Listener(config, directory, cluster)
                episodes = Episodes(renderer, roles.embedders, roles.pool)
                checkpoints = Checkpoints(directory.checkpoints, config.checkpoint.keep)
                session = Session(config, directory, prepared, progress, clock, roles, episodes, trackers, checkpoints)
                try:
                    await roles.learner.enter(session.objective(Phase.GRPO))
                    await run_grpo(session, None)
                finally:
                    await roles.pool.stop()
    return moments


def _pin_learner(core: int) -> None:
    """Give the learner's process the core that nothing else is on. Ray names processes after their actors."""
    learners = [one for one in psutil.Process().children(recursive=True) if "LearnerRank" in " ".join(one.cmdline())]
    assert len(learners) == 1, f"{len(learners)} processes look like the learner"
    pin(learners[0].pid, core)


def _measured(moments: list[_Moment]) -> Measured:
    """From the end of the warm-up, which is the first moment, to the last."""
    first, last = moments[0], moments[-1]
    measured = [one.metrics for one in moments[1:]]
    times = last.times - first.times

    def counted(*names: str) -> float:
        return sum(last.metrics[name] - first.metrics[name] for name in names)

    def mean(name: str) -> float:
        values = [metrics[name] for metrics in measured if name in metrics]
        return sum(values) / max(1, len(values))

    details = (
        "time/step_seconds",
        "time/publish_seconds",
        "time/weight_load_seconds",
        "train/prompt_sharing",
        "train/mismatch_abs_mean",
        "rollout/spanning_fraction",
        "group/buffer_depth",
    )
    return Measured(
        step_seconds=[later.seconds - earlier.seconds for earlier, later in itertools.pairwise(moments)],
        generated_tokens=counted("tokens/generated"),
        trained_tokens=counted("tokens/trained"),
        completion_tokens_mean=mean("rollout/completion_tokens"),
        learner_idle=1 - times.busy_fraction(Role.LEARNER),
        rollout_idle=1 - times.busy_fraction(Role.ROLLOUT_WORKER),
        bottleneck=times.bottleneck(),
        staleness_mean=mean("staleness/mean"),
        staleness_max=max(metrics["staleness/max"] for metrics in measured),
        thrown_away_tokens=counted("tokens/filtered", "tokens/failed", "tokens/stale", "tokens/cancelled"),
        details={name: mean(name) for name in details if any(name in metrics for metrics in measured)},
    )
