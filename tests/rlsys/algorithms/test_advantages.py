import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.advantages import group_mean, group_normalized, is_constant, rewards_of
from tests.rlsys.groups import make_group, make_trajectory

NAN = float("nan")
REWARDS = st.lists(st.floats(-10, 10), min_size=1, max_size=16)


def test_the_group_mean_is_taken_off() -> None:
    # mean(1, 0, 0, 1) = 0.5
    np.testing.assert_array_equal(group_mean(np.array([1.0, 0.0, 0.0, 1.0])), [0.5, -0.5, -0.5, 0.5])


def test_grpo_divides_by_the_population_standard_deviation() -> None:
    # mean(0, 0, 3) = 1; variance (1 + 1 + 4) / 3 = 2
    expected = np.array([-1, -1, 2]) / np.sqrt(2)
    np.testing.assert_allclose(group_normalized(np.array([0.0, 0.0, 3.0]), epsilon=0.0), expected, rtol=1e-12)


def test_epsilon_is_added_to_the_standard_deviation() -> None:
    # deviation 1, standard deviation 1
    np.testing.assert_allclose(group_normalized(np.array([0.0, 2.0]), epsilon=1.0), [-0.5, 0.5], rtol=1e-12)


@pytest.mark.parametrize("advantages", [group_mean, group_normalized])
def test_a_trajectory_without_a_score_takes_no_part(advantages: object) -> None:
    with_nan = advantages(np.array([1.0, NAN, 4.0]))  # type: ignore[operator]
    without = advantages(np.array([1.0, 4.0]))  # type: ignore[operator]
    np.testing.assert_array_equal(with_nan[[0, 2]], without)
    assert np.isnan(with_nan[1])
    assert np.isnan(advantages(np.array([NAN, NAN]))).all()  # type: ignore[operator]


@given(REWARDS, st.floats(-5, 5))
def test_advantages_sum_to_0_and_a_constant_changes_nothing(rewards: list[float], constant: float) -> None:
    rewards_G = np.array(rewards)
    assert abs(group_mean(rewards_G).sum()) < 1e-9
    np.testing.assert_allclose(group_mean(rewards_G + constant), group_mean(rewards_G), atol=1e-9)


def test_equal_rewards_teach_nothing() -> None:
    np.testing.assert_array_equal(group_normalized(np.array([0.5, 0.5, 0.5])), [0, 0, 0])


@pytest.mark.parametrize(
    ("rewards", "constant"),
    [([1, 1], True), ([1, 0], False), ([1, NAN, 1], True), ([1, NAN, 0], False), ([1, NAN], True), ([NAN, NAN], True)],
)
def test_a_group_is_constant_when_its_valid_rewards_are_equal(rewards: list[float], constant: bool) -> None:
    assert is_constant(np.array(rewards, dtype=np.float64)) is constant


def test_rewards_keep_the_order_of_the_group_and_mark_failed_scores() -> None:
    group = make_group(0, [make_trajectory(reward=reward) for reward in (0.25, NAN, 1.0)])
    np.testing.assert_array_equal(rewards_of(group), [0.25, NAN, 1.0])
