"""The controller on scripted roles: what is trained, what is dropped, and what it never does."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from actors.controller import StepRecord
from actors.ports import Sampling
from rlsys.errors import RewardError
from rlsys.pipeline.buffer import BufferSnapshot
from rlsys.pipeline.ledger import DropReason
from tests.actors.controller_rig import Rig, run_quickly
from tests.fakes import FakeRenderer, problem, ticking_clock
from tests.rlsys.virtual_time import run_virtual, time_of_loop

STEPS = 12


def trained(**settings: Any) -> Rig:
    """A rig that has trained to its last step, with workers that take turns at random."""
    chance = random.Random(0)
    rig = Rig(ticking_clock(), steps=STEPS, turns=lambda: chance.choice([1, 1, 2, 30]), **settings)
    run_quickly(rig.train())
    return rig


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_no_group_is_trained_staler_than_the_bound_and_the_bound_is_reached(bound: int) -> None:
    rig = trained(bound=bound)
    staleness = [record.metrics["staleness/max"] for record in rig.records]
    assert max(staleness) == bound


def test_groups_are_trained_in_order_of_admission_each_once() -> None:
    rig = trained()
    tickets = [group.ticket for groups in rig.trained for group in groups]
    assert tickets == list(range(3 * STEPS))


def test_every_version_is_live_on_every_worker_in_order() -> None:
    rig = trained()
    assert [worker.loaded for worker in rig.workers] == [list(range(1, STEPS + 1))] * 2


def test_groups_whose_rewards_are_equal_are_replaced_so_that_every_batch_is_full() -> None:
    rig = trained(reward=lambda one, text: 1.0 if int(one.problem_id[8:]) % 2 else float(text == "0"))
    counts = rig.buffer.ledger.counts()
    assert all(len(groups) == 3 for groups in rig.trained)
    assert counts.groups_dropped[DropReason.FILTERED] > 0
    names = {group.problem.problem_id for groups in rig.trained for group in groups}
    assert all(int(name[8:]) % 2 == 0 for name in names)


def test_equal_rewards_are_trained_on_when_the_filter_is_off() -> None:
    rig = trained(reward=lambda one, text: 1.0, filter_zero_variance=False)
    assert rig.buffer.ledger.counts().groups_dropped[DropReason.FILTERED] == 0


def test_a_trajectory_that_could_not_be_scored_is_not_in_any_batch() -> None:
    rig = trained(reward=lambda one, text: float("nan") if text == "1" else float(text), max_failed=0.5)
    assert {len(batch) for batch in rig.learner.batches} == {3 * 3}  # 3 of the 4 in each group
    assert rig.buffer.ledger.counts().tokens_masked == 2 * 3 * STEPS


def test_the_run_stops_with_the_reason_when_too_many_scores_fail() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        trained(reward=lambda one, text: float("nan"))
    (error,) = caught.value.exceptions
    assert isinstance(error, RewardError)
    assert "scoring.max_failed_fraction=0.2" in str(error)
    assert "it broke" in str(error)


def test_generated_tokens_are_trained_dropped_or_in_flight() -> None:
    rig = trained(reward=lambda one, text: 1.0 if int(one.problem_id[8:]) % 3 else float(text == "0"))
    counts = rig.buffer.ledger.counts()
    assert counts.tokens_generated == (
        counts.tokens_trained + counts.tokens_masked + counts.tokens_in_flight + sum(counts.tokens_discarded.values())
    )


def test_a_policy_that_never_earns_a_difference_stops_the_run_with_the_reason() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        trained(reward=lambda one, text: 0.0)
    (error,) = caught.value.exceptions
    assert "none of the last 60 groups could be trained on" in str(error)


def test_streaming_trains_the_same_groups_in_the_same_steps_in_more_parts() -> None:
    whole, streamed = trained(aggregation="constant"), trained(aggregation="constant", streaming=True)
    for rig in (whole, streamed):
        tickets = [sorted(group.ticket for group in groups) for groups in rig.trained]
        assert tickets == [[3 * step, 3 * step + 1, 3 * step + 2] for step in range(STEPS)]
    assert whole.learner.parts == [1] * STEPS
    assert sum(streamed.learner.parts) > STEPS


def test_a_streamed_step_is_taken_a_group_for_each_rank_at_a_time() -> None:
    rig = trained(aggregation="constant", streaming=True, learner_ranks=2)
    parts = [[len(part.groups) for part in record.parts] for record in rig.records]
    assert [2, 1] in parts
    assert all(part in ([3], [2, 1]) for part in parts)


def test_prompts_go_to_the_worker_that_has_the_fewest() -> None:
    rig = trained(workers=3)
    written = [worker.prompts_written for worker in rig.workers]
    assert min(written) > 0.6 * max(written)


def test_a_worker_that_is_slow_is_given_fewer_prompts() -> None:
    rig = Rig(time_of_loop(), workers=2)
    rig.workers[0].seconds, rig.workers[1].seconds = 10.0, 1.0
    prompt = FakeRenderer().render(problem())

    async def ask() -> None:
        async def later(seconds: float) -> None:
            await asyncio.sleep(seconds)
            await rig.pool.generate(prompt, Sampling(1, 1.0, 8), {})

        await asyncio.gather(*(later(2.0 * number) for number in range(5)))

    run_virtual(ask())
    assert [worker.prompts_written for worker in rig.workers] == [1, 4]


def test_results_are_told_to_the_problem_source_and_lengths_to_the_log() -> None:
    told: list[tuple[str, float]] = []
    rig = Rig(ticking_clock(), steps=STEPS)
    rig.source.record = lambda problem_id, pass_rate: told.append((problem_id, pass_rate))
    run_quickly(rig.train())
    finished = {group.problem.problem_id for groups in rig.trained for group in groups}
    assert finished <= {name for name, _ in told}
    assert {rate for _, rate in told} == {0.25}  # of 4 completions, number 0 is right
    (last,) = [record.metrics for record in rig.records[-1:]]
    assert last["length/generated_mean"] == last["length/trained_mean"] == 2
    assert last["rollout/prefix_cache_hit_fraction"] == 0.5


@pytest.mark.parametrize("order", ["strict", "evict"])
def test_features_are_kept_no_longer_than_their_groups(order: str) -> None:
    rig = trained(order={"kind": order})
    assert (rig.buffer.ledger.counts().groups_dropped[DropReason.STALE] > 0) is (order == "evict")
    assert all(ticket in rig.buffer for ticket in rig.roll_out.features)


@pytest.mark.parametrize("bound", [1, 3])
def test_engine_and_learner_are_compared_at_equal_version_also_in_a_full_pipeline(bound: int) -> None:
    # The learner takes its time, so that every group that it trains is as old as the bound allows.
    rig = Rig(time_of_loop(), steps=STEPS, bound=bound)
    rig.learner.seconds = 10.0
    run_virtual(rig.train())
    newest = [max(group.last_version for group in groups) for groups in rig.trained]
    full = [version for version, written in enumerate(newest) if written < version and version > bound]
    assert len(full) > STEPS / 2
    assert {at: ends for at, ends in rig.learner.probed if at in full} == {version: {version} for version in full}


def test_an_evaluation_is_of_one_version_while_training_goes_on() -> None:
    # `InterleavedEvaluation` raises where more than one version wrote. An evaluation takes longer than a step here.
    rig = Rig(time_of_loop(), steps=STEPS, bound=2, every_versions=4)
    for worker in rig.workers:
        worker.seconds = 1.0
    rig.scorer.seconds = rig.learner.seconds = 0.01
    run_virtual(rig.train())
    assert rig.evaluated == [0, 4, 8, 12]
    assert len(rig.records) == STEPS


def test_a_resumed_run_makes_up_for_the_evaluation_that_it_lost_and_repeats_none() -> None:
    for evaluated, expected in ((), [4, 8]), ((4,), [8]):
        rig = Rig(ticking_clock(), steps=8, every_versions=4, evaluated=evaluated, snapshot=(halfway(), 4))
        run_quickly(rig.train())
        assert rig.evaluated == expected


def test_a_resumed_run_trains_what_was_finished_and_rolls_out_again_what_was_under_way() -> None:
    snapshot = halfway()
    kept = {group.ticket for group in snapshot.finished} | {admission.ticket for admission in snapshot.in_flight}
    assert snapshot.finished
    assert snapshot.in_flight
    rig = Rig(ticking_clock(), steps=8, snapshot=(snapshot, 4))
    run_quickly(rig.train())
    trained_now = {group.ticket for groups in rig.trained for group in groups}
    assert kept <= trained_now


def halfway() -> BufferSnapshot:
    """Of a run at version 4, with finished groups and groups under way."""
    rig = Rig(ticking_clock(), steps=4, turns=iter([1, 1, 200] * 100).__next__, bound=1)
    snapshots: list[BufferSnapshot] = []

    async def train() -> None:
        async def after_step(_: StepRecord) -> None:
            for _ in range(20):
                await asyncio.sleep(0)
            snapshots.append(rig.buffer.snapshot())

        await rig.controller.run(4, after_step)

    run_quickly(train())
    return snapshots[-1]
