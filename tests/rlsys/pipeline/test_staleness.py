import pytest

from rlsys.config_grpo import EvictOrder, StrictOrder, WindowedOrder
from rlsys.pipeline.staleness import (
    EvictStaleness,
    StalenessPolicy,
    StrictStaleness,
    WindowedStaleness,
    group_staleness,
    make_policy,
)
from tests.rlsys.groups import make_group, make_trajectory


def never(_: int) -> int:
    return 0


@pytest.mark.parametrize(
    ("policy", "slots"),
    [
        (StrictStaleness(0, 4), 4),
        (StrictStaleness(1, 4), 8),
        (StrictStaleness(3, 1), 4),
        (WindowedStaleness(2, 4, 5), 7),
        (EvictStaleness(2, 4), 12),
    ],
)
def test_there_are_slots_for_one_batch_more_than_the_bound_less_the_window(policy: StalenessPolicy, slots: int) -> None:
    assert policy.required_capacity == slots
    assert policy.admit(slots - 1)
    assert not policy.admit(slots)


def test_a_window_that_leaves_no_whole_batch_is_refused() -> None:
    assert WindowedStaleness(2, 4, 8).required_capacity == 4
    with pytest.raises(AssertionError, match=r"a window of 9 groups leaves 3 slots for batches of 4; .* at most 8"):
        WindowedStaleness(2, 4, 9)


def test_the_configuration_names_the_policy() -> None:
    assert make_policy(StrictOrder(), 1, 4) == StrictStaleness(1, 4)
    assert make_policy(WindowedOrder(kind="windowed", window=3), 1, 4) == WindowedStaleness(1, 4, 3)
    assert make_policy(EvictOrder(kind="evict"), 1, 4) == EvictStaleness(1, 4)


def test_strict_order_is_certain_of_the_finished_among_the_oldest() -> None:
    policy = StrictStaleness(bound=1, groups_per_step=3)
    assert policy.select([3, 5, 6, 7], {6, 7}, room=3, passed=never) == (6,)
    assert policy.select([3, 5, 6, 7], {3, 5, 6, 7}, room=3, passed=never) == (3, 5, 6)
    assert policy.select([3, 5, 6, 7], {6, 7}, room=2, passed=never) == ()


def test_a_window_lets_younger_groups_take_the_place_of_slow_ones() -> None:
    policy = WindowedStaleness(bound=2, groups_per_step=3, window=2)
    # 5 is among the three oldest, 7 takes the place of 6. Then 3 has the last place: 8 would be the third to pass it.
    assert policy.select([3, 5, 6, 7, 8], {5, 7, 8}, room=3, passed=never) == (5, 7)
    # 7 takes the place of 6, and 8 that of 4; they alone would pass 3, which has the last place: so would 9.
    assert policy.select([3, 4, 6, 7, 8, 9], {7, 8, 9}, room=3, passed=never) == (7, 8)
    assert policy.select([3, 4, 6, 7, 8, 9], {4, 6}, room=2, passed=never) == (4, 6)


def test_a_group_that_was_passed_as_often_as_may_be_blocks_the_younger_ones() -> None:
    policy = WindowedStaleness(bound=2, groups_per_step=3, window=2)
    passed = {3: 2, 4: 1, 6: 1}
    # With three places 3, 4 and 6 are in the batch. 7 may take the place of 6, which one group has passed; then 8
    # would take that of 4, which two have passed.
    assert policy.select([3, 4, 6, 7, 8], {7, 8}, room=3, passed=lambda ticket: passed.get(ticket, 0)) == (7,)
    # With one place left, 3 must be in it.
    assert policy.select([3, 4, 6, 7, 8], {4, 7, 8}, room=1, passed=lambda ticket: passed.get(ticket, 0)) == ()
    assert policy.select([3, 4, 6, 7, 8], {3, 7, 8}, room=1, passed=lambda ticket: passed.get(ticket, 0)) == (3,)


def test_eviction_takes_what_finishes_first_and_throws_away_what_is_over_the_bound() -> None:
    policy = EvictStaleness(bound=2, groups_per_step=2)
    assert policy.select([1, 2, 3, 4], [4, 2, 3], room=2, passed=never) == (4, 2)
    groups = [make_group(version, [make_trajectory([(version, 1)])]) for version in range(6)]
    assert policy.evict(groups, learner_version=5) == (0, 1, 2)


def test_weights_go_live_in_the_order_of_training() -> None:
    policy = StrictStaleness(bound=1, groups_per_step=2)
    assert policy.release([1, 2, 3, 4], []) == ()
    assert policy.release([1, 2, 3, 4], [2, 1]) == (2, 1)
    with pytest.raises(AssertionError, match="order of training"):
        policy.release([1, 2, 3, 4], [3, 4])


def test_slots_are_released_once() -> None:
    policy = StrictStaleness(bound=1, groups_per_step=2)
    with pytest.raises(AssertionError, match="order of training"):
        policy.release([3, 4], [1, 2])


def test_eviction_frees_the_slots_at_the_step() -> None:
    assert EvictStaleness(bound=1, groups_per_step=2).release([1, 2], []) == (1, 2)


def test_the_worst_staleness_counts_the_batches_that_may_come_before() -> None:
    # Ten older groups wait: two whole batches of 4 are before it; with 3 passes left, three are.
    assert StrictStaleness(5, 4).worst_staleness(now=1, place=10, passed=0) == 3
    assert WindowedStaleness(5, 4, 5).worst_staleness(now=1, place=10, passed=2) == 4
    assert WindowedStaleness(5, 4, 5).worst_staleness(now=1, place=10, passed=8) == 3
    assert EvictStaleness(5, 4).worst_staleness(now=9, place=10, passed=0) == 5


def test_staleness_counts_from_the_oldest_first_token_of_the_group() -> None:
    # Written by versions 3..4 and 4..6; used at 7. First 3, last 6: 4 versions in all, 3 in flight and 1 in the queue.
    group = make_group(0, [make_trajectory([(4, 1), (6, 2)]), make_trajectory([(3, 5), (4, 1)])])
    assert group_staleness(group, 7) == (4, 3, 1)


@pytest.mark.parametrize("policy", [StrictStaleness(2, 1), WindowedStaleness(2, 1, 1), EvictStaleness(2, 1)])
@pytest.mark.parametrize("learner_version", [1, 5])
def test_a_group_outside_the_bound_or_from_the_future_is_refused(policy: StalenessPolicy, learner_version: int) -> None:
    group = make_group(9, [make_trajectory([(2, 1)])])
    policy.check([group], 2)
    policy.check([group], 4)
    with pytest.raises(AssertionError, match="group 9"):
        policy.check([group], learner_version)
