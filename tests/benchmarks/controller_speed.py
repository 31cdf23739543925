"""How many groups a second the controller can look after, on one core and with roles that cost nothing.

    python -m tests.benchmarks.controller_speed [--steps 200] [--profile] [--out FILE.json]

The real Controller, RollOut, TrajectoryBuffer, StepMetrics, pools and samples; scripted roles (`tests.fakes`). One
process serves all rollout workers and learner ranks of a run, so this bounds the size of a cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import itertools
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from actors.controller import Controller, StepRecord
from actors.embedder_pool import EmbedderPool
from actors.episodes import Episodes
from actors.interleaved import InterleavedEvaluation
from actors.ports import Features, Sampling
from actors.roll_out import FRUITLESS_BATCHES, RollOut
from actors.rollout_pool import RolloutPool
from actors.scorer_pool import ScorerPool
from actors.step_metrics import StepMetrics
from rlsys.config import RewardPartConfig
from rlsys.config_grpo import GrpoConfig
from rlsys.data.batches import BatchMaker
from rlsys.data.cursor import ProblemCursor
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.lengths import LengthLog
from rlsys.pipeline.staleness import make_policy
from rlsys.pipeline.waits import Role, WaitClock
from rlsys.rewards.failures import FailureGuard
from rlsys.types import Completion, Prompt, TrajectoryGroup
from tests.fakes import FakeEmbedder, FakeLearner, FakeRenderer, FakeScorer, FakeWorker, completion, problem

GROUPS_PER_STEP, GROUP_SIZE, WORKERS, SCORERS = 32, 8, 4, 4
COMPLETION_TOKENS = 80
GOAL = 2000
"""Groups per second."""


class FreeWorker(FakeWorker):
    """Writes completions that it has already."""

    async def generate(self, prompt: Prompt, sampling: Sampling, features: Features) -> tuple[Completion, ...]:
        """The same texts for every prompt, one loop turn later."""
        version = self.version
        await asyncio.sleep(0)
        return _completions(version, sampling.completions)


@lru_cache(maxsize=8)
def _completions(version: int, number: int) -> tuple[Completion, ...]:
    return tuple(completion(version, str(index), COMPLETION_TOKENS) for index in range(number))


async def _never(*_: object) -> Any:
    raise AssertionError("no scorer hangs and nothing is evaluated here")


def make_controller(steps: int) -> Controller:
    """The controller of a run, as `actors.grpo_phase` puts it together, round scripted roles."""
    config = GrpoConfig(steps=steps, groups_per_step=GROUPS_PER_STEP, group_size=GROUP_SIZE)
    buffer = TrajectoryBuffer(make_policy(config.order, config.max_staleness, config.groups_per_step))
    members = dict.fromkeys(Role, 1) | {Role.ROLLOUT_WORKER: WORKERS, Role.REWARD_SCORER: SCORERS}
    clock = WaitClock(time.monotonic, members)
    workers: list[Any] = [FreeWorker() for _ in range(WORKERS)]
    pool = RolloutPool(workers, clock)
    renderer: Any = FakeRenderer()
    episodes = Episodes(renderer, EmbedderPool([FakeEmbedder()], clock), pool)
    batches = BatchMaker(config, max_new_tokens=2 * COMPLETION_TOKENS)
    metrics = StepMetrics(buffer, clock, LengthLog(), batches)
    guard = FailureGuard(0.2)

    def watch(_: object, group: TrajectoryGroup) -> None:
        guard.record(group.trajectories)

    return Controller(
        config,
        roll_out=RollOut(
            Sampling(GROUP_SIZE, 1.0, 2 * COMPLETION_TOKENS),
            episodes=episodes,
            scorers=ScorerPool(
                [FakeScorer() for _ in range(SCORERS)], _never, {"answer": RewardPartConfig(kind="answer")}, clock
            ),
            activity=pool.activity,
            buffer=buffer,
            source=ProblemCursor([problem(number) for number in range(1000)], seed=0, stream="grpo"),
            batches=batches,
            observers=[metrics.note_group, watch],
            fruitless_groups=FRUITLESS_BATCHES * GROUPS_PER_STEP,
        ),
        learner=FakeLearner(),
        pool=pool,
        episodes=episodes,
        buffer=buffer,
        batches=batches,
        evaluation=InterleavedEvaluation(pool, None, _never, lambda version, result: None),
        metrics=metrics,
        clock=clock,
    )


async def step_ends(steps: int) -> list[float]:
    """Train; how much processor time was used at the end of each step.

    The one thread never waits for anything but the processor, so that this is wall time on a machine that does nothing
    else, and does not change on one that does.
    """
    ends: list[float] = []

    async def after_step(_: StepRecord) -> None:
        ends.append(time.process_time())

    await make_controller(steps).run(steps, after_step)
    return ends


def groups_per_second(ends: Sequence[float], stretch: int = 20) -> list[float]:
    """The rates of stretches of so many steps; the first step, which fills the buffer, is left out."""
    marks = ends[::stretch]
    return [stretch * GROUPS_PER_STEP / (later - earlier) for earlier, later in itertools.pairwise(marks)]


def heaviest(profile: cProfile.Profile, number: int = 10) -> str:
    """The functions with the most time of their own."""
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(number)
    return text.getvalue().strip()


def main() -> None:
    """Measure, or profile; the profiler slows Python down several times, so its rate is none."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.controller_speed", description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--profile", action="store_true", help="print the ten heaviest functions instead of the rate")
    parser.add_argument("--out", type=Path, help="write the rates here as JSON")
    arguments = parser.parse_args()
    if arguments.steps <= 20:
        parser.error("--steps is more than 20: a rate is that of 20 steps")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if arguments.profile:
        profile = cProfile.Profile()
        profile.runcall(asyncio.run, step_ends(arguments.steps))
        sys.stdout.write(heaviest(profile) + "\n")
        return
    rates = groups_per_second(asyncio.run(step_ends(arguments.steps)))
    rate = statistics.median(rates)
    sys.stdout.write(
        f"{rate:.0f} groups/s (median of {len(rates)} stretches, {min(rates):.0f}-{max(rates):.0f}; goal {GOAL}), "
        f"{rate * GROUP_SIZE:.0f} trajectories/s\n"
    )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"groups_per_second": rate, "stretches": rates, "goal": GOAL}) + "\n")


if __name__ == "__main__":
    main()
