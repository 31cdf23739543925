"""The laws of the buffer for all policies under random paces, and how the policies compare."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.staleness import StalenessPolicy
from tests.rlsys.pipeline.laws import most_passed, run_checked
from tests.rlsys.pipeline.policies import (
    BATCH_SIZES,
    BOUNDS,
    UncheckedEvict,
    UncheckedStrict,
    UncheckedWindowed,
    policies,
)
from tests.rlsys.pipeline.simulation import Books, Pace

SEEDS = st.integers(0, 10**6)
ANY_PACE = st.builds(
    Pace,
    learn_seconds=st.sampled_from([0.0, 0.1, 1.0, 20.0]),
    load_seconds=st.sampled_from([0.0, 0.3, 5.0]),
    group_seconds=st.sampled_from([0.5, 1.0]),
    groups_at_once=st.sampled_from([1, 5, 40]),
    drop_rate=st.sampled_from([0.0, 0.3, 0.8]),
    seconds_between_losses=st.sampled_from([None, None, 20.0]),
    roll_out_again=st.booleans(),
    streaming=st.booleans(),
)
HEAVY_TAIL = Pace(learn_seconds=10.0, groups_at_once=40, streaming=True)
"""Half of the groups take up to 2 s, and one in a hundred over a minute: six steps of the learner."""


@settings(deadline=None, max_examples=100)
@given(policy=policies(), pace=ANY_PACE, seed=SEEDS)
def test_the_laws_hold_for_any_order_of_events(policy: StalenessPolicy, pace: Pace, seed: int) -> None:
    run_checked(TrajectoryBuffer, policy, pace, seed, steps=12)


@settings(deadline=None, max_examples=20)
@given(bound=BOUNDS, groups_per_step=BATCH_SIZES, streaming=st.booleans(), seed=SEEDS)
def test_the_laws_hold_where_everything_happens_at_once(
    bound: int, groups_per_step: int, streaming: bool, seed: int
) -> None:
    pace = Pace(learn_seconds=0.0, load_seconds=0.0, group_seconds=0.0, drop_rate=0.3, streaming=streaming)
    run_checked(TrajectoryBuffer, UncheckedStrict(bound, groups_per_step), pace, seed, steps=12)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("groups_per_step", [1, 4])
@pytest.mark.parametrize("bound", [0, 1, 3])
def test_a_slow_learner_reaches_the_bound(bound: int, groups_per_step: int, streaming: bool) -> None:
    pace = Pace(learn_seconds=20.0, drop_rate=0.2, streaming=streaming)
    books = run_checked(TrajectoryBuffer, UncheckedStrict(bound, groups_per_step), pace, seed=1, steps=40)
    assert max(books.staleness) == bound
    assert books.most_held == (bound + 1) * groups_per_step


@settings(deadline=None, max_examples=40)
@given(bound=BOUNDS, groups_per_step=BATCH_SIZES, pace=ANY_PACE, seed=SEEDS)
def test_a_streamed_batch_is_the_batch_that_is_waited_for(
    bound: int, groups_per_step: int, pace: Pace, seed: int
) -> None:
    # Without lost workers what becomes of a group does not depend on when it runs.
    pace = replace(pace, seconds_between_losses=None)
    waited_for, streamed = (
        run_checked(
            TrajectoryBuffer,
            UncheckedStrict(bound, groups_per_step),
            replace(pace, streaming=streaming),
            seed,
            steps=10,
        )
        for streaming in (False, True)
    )
    assert [sorted(batch) for batch in streamed.batches] == [sorted(batch) for batch in waited_for.batches]


@settings(deadline=None, max_examples=40)
@given(bound=BOUNDS, groups_per_step=BATCH_SIZES, pace=ANY_PACE, seed=SEEDS)
def test_a_window_of_none_is_the_strict_policy(bound: int, groups_per_step: int, pace: Pace, seed: int) -> None:
    windowed, strict = (
        run_checked(TrajectoryBuffer, policy, pace, seed, steps=10)
        for policy in (UncheckedWindowed(bound, groups_per_step, 0), UncheckedStrict(bound, groups_per_step))
    )
    assert windowed == strict


def total_wait(policy: StalenessPolicy, pace: Pace) -> float:
    return sum(run_checked(TrajectoryBuffer, policy, pace, seed, steps=40).learner_waited for seed in range(5))


def test_a_learner_waits_less_for_slow_groups_where_others_may_pass_them() -> None:
    # The bound leaves little to win: in any order only S batches are trained while one group is under way.
    strict, windowed = UncheckedStrict(4, 8), UncheckedWindowed(4, 8, window=16)
    assert total_wait(windowed, HEAVY_TAIL) < 0.96 * total_wait(strict, HEAVY_TAIL)


def test_a_learner_waits_less_where_it_starts_on_the_first_groups() -> None:
    policy = UncheckedStrict(1, 4)
    streamed, waited_for = (Pace(learn_seconds=10.0, streaming=streaming) for streaming in (True, False))
    assert total_wait(policy, streamed) < 0.9 * total_wait(policy, waited_for)


def test_a_window_is_used_up_to_its_limit() -> None:
    books = run_checked(TrajectoryBuffer, UncheckedWindowed(4, 8, window=16), HEAVY_TAIL, seed=1, steps=40)
    assert most_passed(books) == 16


def mean_tokens(books: Books, tickets: list[int]) -> float:
    return sum(books.tokens[ticket] for ticket in tickets) / len(tickets)


def test_eviction_throws_long_groups_away_and_strict_order_nothing() -> None:
    pace = Pace(learn_seconds=0.5, groups_at_once=40)
    evicted, strict = (
        run_checked(TrajectoryBuffer, policy, pace, seed=3, steps=150)
        for policy in (UncheckedEvict(1, 8), UncheckedStrict(1, 8))
    )
    # Both let at most two batches of groups under way at the end; what else was generated is trained, or was too old.
    assert len(strict.tokens) - len(strict.trained) <= 16
    assert len(evicted.tokens) - len(evicted.trained) > 100
    assert mean_tokens(evicted, evicted.trained) < 0.7 * mean_tokens(strict, strict.trained)
