import pytest

from rlsys.pipeline.staleness import StrictStaleness, group_staleness
from tests.rlsys.groups import make_group, make_trajectory


@pytest.mark.parametrize(("bound", "groups_per_step", "slots"), [(0, 4, 4), (1, 4, 8), (3, 1, 4)])
def test_there_are_slots_for_one_batch_more_than_the_bound(bound: int, groups_per_step: int, slots: int) -> None:
    policy = StrictStaleness(bound, groups_per_step)
    assert policy.required_capacity == slots
    assert policy.may_admit(slots - 1)
    assert not policy.may_admit(slots)


def test_a_batch_is_the_oldest_groups_and_waits_for_each_of_them() -> None:
    policy = StrictStaleness(bound=1, groups_per_step=2)
    assert policy.select([3, 5, 6], finished={5, 6}) is None
    assert policy.select([3, 5, 6], finished={3, 5, 6}) == (3, 5)
    assert policy.select([3], finished={3}) is None


def test_weights_go_live_in_the_order_of_training() -> None:
    policy = StrictStaleness(bound=1, groups_per_step=2)
    assert policy.release([1, 2, 3, 4], [2, 1]) == (2, 1)
    with pytest.raises(AssertionError, match="order of training"):
        policy.release([1, 2, 3, 4], [3, 4])


def test_staleness_counts_from_the_oldest_first_token_of_the_group() -> None:
    # Written by versions 3..4 and 4..6; used at 7. First 3, last 6: 4 versions in all, 3 in flight and 1 in the queue.
    group = make_group(0, [make_trajectory([(4, 1), (6, 2)]), make_trajectory([(3, 5), (4, 1)])])
    assert group_staleness(group, 7) == (4, 3, 1)


@pytest.mark.parametrize("learner_version", [1, 5])
def test_a_group_outside_the_bound_or_from_the_future_is_refused(learner_version: int) -> None:
    policy = StrictStaleness(bound=2, groups_per_step=1)
    group = make_group(9, [make_trajectory([(2, 1)])])
    policy.check([group], 2)
    policy.check([group], 4)
    with pytest.raises(AssertionError, match="group 9"):
        policy.check([group], learner_version)
