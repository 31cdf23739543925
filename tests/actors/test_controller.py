"""The controller on scripted roles: what is trained, what is dropped, and what it never does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from actors.controller import Controller, StepRecord
from actors.episodes import Episodes
from actors.evaluator import Evaluated, evaluate
from actors.interleaved import InterleavedEvaluation
from actors.ports import Sampling
from actors.roll_out import RollOut
from actors.rollout_pool import RolloutPool
from actors.scorer_pool import ScorerPool
from actors.step_metrics import StepMetrics
from rlsys.config import GrpoConfig, RewardPartConfig
from rlsys.data.batches import BatchMaker
from rlsys.data.cursor import ProblemCursor
from rlsys.errors import RewardError
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.ledger import DropReason
from rlsys.pipeline.lengths import LengthLog
from rlsys.pipeline.staleness import StrictStaleness
from rlsys.pipeline.waits import Role, WaitClock
from rlsys.rewards.failures import FailureGuard
from rlsys.types import Problem, TrajectoryGroup
from tests.fakes import FakeEmbedder, FakeLearner, FakeRenderer, FakeScorer, FakeWorker, problem, ticking_clock

STEPS = 12


class Rig:
    """A controller with fakes round it, run to its last step."""

    def __init__(
        self,
        *,
        bound: int = 1,
        reward: Callable[[Problem, str], float] | None = None,
        max_failed: float = 0.2,
        workers: int = 2,
        every_versions: int | None = None,
        **grpo: Any,
    ) -> None:
        chance = random.Random(0)
        self.learner = FakeLearner()
        self.workers = [FakeWorker(lambda: chance.choice([1, 1, 2, 30])) for _ in range(workers)]
        self.embedder = FakeEmbedder()
        self.records: list[StepRecord] = []
        self.evaluated: list[int] = []
        config = GrpoConfig(steps=STEPS, groups_per_step=3, group_size=4, max_staleness=bound, **grpo)
        self.buffer = TrajectoryBuffer(StrictStaleness(bound, 3))
        clock = WaitClock(ticking_clock(), {Role.LEARNER: 1, Role.ROLLOUT_WORKER: workers})
        pool = RolloutPool(self.workers, clock)
        scorer = FakeScorer(reward) if reward else FakeScorer()
        parts = {"answer": RewardPartConfig(kind="answer")}

        async def never(_: object) -> Any:
            raise AssertionError("no scorer hangs here")

        async def run() -> None:
            episodes = Episodes(FakeRenderer(), [self.embedder], pool)  # pyright: ignore[reportArgumentType]
            metrics = StepMetrics(self.buffer, clock, LengthLog())
            batches = BatchMaker(config, max_new_tokens=8)
            guard = FailureGuard(max_failed)
            held_out = [problem(number) for number in range(100, 106)]

            async def evaluate_now() -> Evaluated:
                return await evaluate(
                    episodes, held_out, samples=1, temperature=1.0, max_new_tokens=8, floor=0.0, progress=lambda _: None
                )

            self.controller = Controller(
                config,
                roll_out=RollOut(
                    Sampling(4, 1.0, 8),
                    episodes=episodes,
                    scorers=ScorerPool([scorer], never, parts),
                    buffer=self.buffer,
                    source=ProblemCursor([problem(number) for number in range(50)], 0, "grpo"),
                    batches=batches,
                    observers=[metrics.note_group, lambda _, group: guard.record(group.trajectories)],
                    fruitless_groups=60,
                ),
                learner=self.learner,
                pool=pool,
                episodes=episodes,
                buffer=self.buffer,
                batches=batches,
                evaluation=InterleavedEvaluation(
                    pool, every_versions, evaluate_now, lambda version, _: self.evaluated.append(version)
                ),
                metrics=metrics,
                clock=clock,
            )

            async def after_step(record: StepRecord) -> None:
                self.records.append(record)
                self.buffer.ledger.check()

            await self.controller.run(STEPS, after_step)

        asyncio.run(asyncio.wait_for(run(), 20))


def groups_of(record: StepRecord) -> list[TrajectoryGroup]:
    return [group for part in record.parts for group in part.groups]


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_no_group_is_trained_staler_than_the_bound_and_the_bound_is_reached(bound: int) -> None:
    rig = Rig(bound=bound)
    staleness = [record.metrics["staleness/max"] for record in rig.records]
    assert max(staleness) == bound


def test_groups_are_trained_in_order_of_admission_each_once() -> None:
    rig = Rig()
    tickets = [group.ticket for record in rig.records for group in groups_of(record)]
    assert tickets == list(range(3 * STEPS))


def test_every_version_is_live_on_every_worker_in_order() -> None:
    rig = Rig()
    assert [worker.loaded for worker in rig.workers] == [list(range(1, STEPS + 1))] * 2


def test_groups_whose_rewards_are_equal_are_replaced_so_that_every_batch_is_full() -> None:
    rig = Rig(reward=lambda one, text: 1.0 if int(one.problem_id[8:]) % 2 else float(text == "0"))
    counts = rig.buffer.ledger.counts()
    assert all(len(groups_of(record)) == 3 for record in rig.records)
    assert counts.groups_dropped[DropReason.FILTERED] > 0
    trained = {group.problem.problem_id for record in rig.records for group in groups_of(record)}
    assert all(int(name[8:]) % 2 == 0 for name in trained)


def test_equal_rewards_are_trained_on_when_the_filter_is_off() -> None:
    rig = Rig(reward=lambda one, text: 1.0, filter_zero_variance=False)
    assert rig.buffer.ledger.counts().groups_dropped[DropReason.FILTERED] == 0


def test_a_trajectory_that_could_not_be_scored_is_not_in_any_batch() -> None:
    rig = Rig(reward=lambda one, text: float("nan") if text == "1" else float(text), max_failed=0.5)
    assert {len(batch) for batch in rig.learner.batches} == {3 * 3}  # 3 of the 4 in each group
    assert rig.buffer.ledger.counts().tokens_masked == 2 * 3 * STEPS


def test_the_run_stops_with_the_reason_when_too_many_scores_fail() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        Rig(reward=lambda one, text: float("nan"))
    (error,) = caught.value.exceptions
    assert isinstance(error, RewardError)
    assert "scoring.max_failed_fraction=0.2" in str(error)
    assert "it broke" in str(error)


def test_generated_tokens_are_trained_dropped_or_in_flight() -> None:
    rig = Rig(reward=lambda one, text: 1.0 if int(one.problem_id[8:]) % 3 else float(text == "0"))
    counts = rig.buffer.ledger.counts()
    assert counts.tokens_generated == (
        counts.tokens_trained + counts.tokens_masked + counts.tokens_in_flight + sum(counts.tokens_discarded.values())
    )


def test_a_policy_that_never_earns_a_difference_stops_the_run_with_the_reason() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        Rig(reward=lambda one, text: 0.0)
    (error,) = caught.value.exceptions
    assert "none of the last 60 groups could be trained on" in str(error)


def test_streaming_trains_the_same_groups_in_the_same_steps_in_more_parts() -> None:
    whole, streamed = Rig(aggregation="constant"), Rig(aggregation="constant", streaming=True)
    for rig in (whole, streamed):
        tickets = [sorted(group.ticket for group in groups_of(record)) for record in rig.records]
        assert tickets == [[3 * step, 3 * step + 1, 3 * step + 2] for step in range(STEPS)]
    assert whole.learner.parts == [1] * STEPS
    assert sum(streamed.learner.parts) > STEPS


def test_an_evaluation_is_of_one_version_while_training_goes_on() -> None:
    # `InterleavedEvaluation` raises where more than one version wrote.
    rig = Rig(every_versions=4)
    assert rig.evaluated == [4, 8, 12]
    assert len(rig.records) == STEPS
