import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlsys.algorithms.advantages import (
    advantages,
    group_mean,
    group_normalized,
    is_constant,
    is_groupwise,
    length_controlled,
    lengths_of,
    pass_at_k,
    reinforce_plus_plus,
    rewards_of,
    rloo,
)
from rlsys.config_grpo import (
    Advantage,
    GroupMeanAdvantage,
    GroupNormalizedAdvantage,
    LengthControlledAdvantage,
    PassAtKAdvantage,
    ReinforcePlusPlusAdvantage,
    RlooAdvantage,
)
from tests.rlsys.groups import make_group, make_trajectory

OfGroup = Callable[[NDArray[np.float64]], NDArray[np.float64]]
OF_GROUP: dict[str, OfGroup] = {
    "group_mean": group_mean,
    "group_normalized": group_normalized,
    "rloo": rloo,
    "pass_at_2": lambda rewards_G: pass_at_k(rewards_G, 2),
    "pass_at_4": lambda rewards_G: pass_at_k(rewards_G, 4),
    "reinforce_plus_plus": lambda rewards_G: reinforce_plus_plus([rewards_G])[0],
}
every_kind = pytest.mark.parametrize("of_group", OF_GROUP.values(), ids=OF_GROUP.keys())

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


@every_kind
def test_a_trajectory_without_a_score_takes_no_part(of_group: OfGroup) -> None:
    with_nan, without = of_group(np.array([1.0, NAN, 4.0, 0.5])), of_group(np.array([1.0, 4.0, 0.5]))
    np.testing.assert_array_equal(with_nan[[0, 2, 3]], without)
    assert np.isnan(with_nan[1])
    assert np.isnan(of_group(np.array([NAN, NAN]))).all()


@every_kind
def test_a_trajectory_alone_has_nothing_to_be_compared_with(of_group: OfGroup) -> None:
    np.testing.assert_array_equal(of_group(np.array([0.7, NAN])), [0, NAN])


@every_kind
@settings(deadline=None)
@given(rewards=REWARDS, constant=st.floats(-5, 5))
def test_advantages_sum_to_0_and_a_constant_changes_nothing(
    of_group: OfGroup, rewards: list[float], constant: float
) -> None:
    # Deviations of 1e-9 in units of themselves are all rounding; so rewards on a grid.
    rewards_G = np.round(np.array(rewards), 2)
    assert abs(of_group(rewards_G).sum()) < 1e-7
    np.testing.assert_allclose(of_group(rewards_G + constant), of_group(rewards_G), atol=1e-7)


@every_kind
def test_equal_rewards_teach_nothing(of_group: OfGroup) -> None:
    np.testing.assert_allclose(of_group(np.array([0.5, 0.5, 0.5])), [0, 0, 0], atol=1e-12)


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    # The others' means are 2.5, 3 and 0.5.
    np.testing.assert_allclose(rloo(np.array([1.0, 0.0, 5.0])), [-1.5, -3, 4.5])


def test_reinforce_plus_plus_divides_by_the_deviation_of_the_step() -> None:
    # Numerators ±1, ±3, and 0 of a group of equal rewards, which counts; NaN does not. Variance 20/6 = 10/3.
    rewards = [np.array([0.0, 2.0]), np.array([1.0, NAN, 7.0]), np.array([4.0, 4.0])]
    first, second, third = reinforce_plus_plus(rewards, epsilon=0.0)
    np.testing.assert_allclose(first, np.array([-1, 1]) / np.sqrt(10 / 3))
    np.testing.assert_allclose(second, np.array([-3, NAN, 3]) / np.sqrt(10 / 3))
    np.testing.assert_array_equal(third, [0, 0])
    assert reinforce_plus_plus([]) == []


def test_a_longer_success_earns_less() -> None:
    # Successes of 10 and 30 tokens: mean 20, deviation 10, sigmoid(±1) = 0.731059, 0.268941. alpha 0.5 makes the
    # rewards 2·(1 - 0.5·0.268941) = 1.731059, 0, 2·(1 - 0.5·0.731059) = 1.268941; then leave one out.
    rewards, lengths = np.array([2.0, 0.0, 2.0]), np.array([10.0, 999.0, 30.0])
    lowered = np.array([1.7310586, 0.0, 1.2689414])
    np.testing.assert_allclose(length_controlled(rewards, lengths, 0.5), rloo(lowered), rtol=1e-6)
    # alpha 0, and successes of equal length, are plain leave-one-out (of rewards that are all lowered alike)
    np.testing.assert_allclose(length_controlled(rewards, lengths, 0.0), rloo(rewards))
    np.testing.assert_allclose(length_controlled(rewards, np.full(3, 7.0), 0.5), rloo(rewards * 0.75))


def test_the_length_of_failures_and_of_failed_scores_plays_no_part() -> None:
    rewards = np.array([1.0, 0.0, 1.0, NAN, -0.5])
    lengths = np.array([10.0, 20.0, 30.0, 5.0, 900.0])
    controlled = length_controlled(rewards, lengths, 0.3)
    lengths[[1, 3, 4]] = 1.0
    np.testing.assert_array_equal(length_controlled(rewards, lengths, 0.3), controlled)
    assert np.isnan(controlled[3])
    failures = np.array([0.0, -1.0, NAN])
    np.testing.assert_array_equal(length_controlled(failures, np.ones(3), 0.3), rloo(failures))


def test_equal_successes_of_different_length_are_told_apart() -> None:
    controlled = length_controlled(np.ones(3), np.array([5.0, 9.0, 30.0]), 0.1)
    assert controlled[0] > controlled[1] > controlled[2]
    assert not is_constant(controlled)


def subsets_max(rewards: list[float], k: int) -> float:
    """The mean over all subsets of k of their maximum, one by one."""
    best = [max(subset) for subset in itertools.combinations(rewards, k)]
    return sum(best) / len(best)


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=7), st.integers(1, 6))
def test_pass_at_k_weights_are_those_of_an_enumeration_of_subsets(rewards: list[float], k: int) -> None:
    size = min(k, len(rewards) - 1)
    expected: list[float] = []
    for place in range(len(rewards)):
        others = rewards[:place] + rewards[place + 1 :]
        # The paper's weight: the maxima of the subsets with i, over the number of all subsets; then the baseline.
        with_i = [max(rewards[place], *subset) if subset else rewards[place]
                  for subset in itertools.combinations(others, size - 1)]  # fmt: skip
        s = sum(with_i) / math.comb(len(rewards), size)
        expected.append(len(rewards) * (s - size / len(rewards) * subsets_max(others, size)))
    np.testing.assert_allclose(pass_at_k(np.array(rewards), k), expected, atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=9))
def test_pass_at_1_is_leave_one_out(rewards: list[float]) -> None:
    np.testing.assert_allclose(pass_at_k(np.array(rewards), 1), rloo(np.array(rewards)), atol=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(8, 1, 4), (8, 3, 2), (8, 7, 4), (5, 0, 3), (6, 6, 2), (8, 5, 4)])
def test_pass_at_k_of_binary_rewards_has_the_closed_form(n: int, c: int, k: int) -> None:
    def rho(total: int, right: int) -> float:
        return 1 - math.comb(total - right, k) / math.comb(total, k)

    weights = pass_at_k(np.array([1.0] * c + [0.0] * (n - c)), k)
    success = n * (rho(n, c) - rho(n - 1, c - 1)) if c > 0 else math.nan
    failure = n * (rho(n, c) - rho(n - 1, c)) if c < n else math.nan
    np.testing.assert_allclose(weights, [success] * c + [failure] * (n - c), atol=1e-12)


def test_the_mean_of_pass_at_k_weighted_scores_is_the_gradient_of_pass_at_k() -> None:
    # A policy that succeeds with p = sigmoid(θ): pass@2 = 1 - (1 - p)², its derivative by θ is 2(1 - p)·p(1 - p).
    # The score of a success is 1 - p, of a failure -p. All 2⁴ groups of 4, each with its probability.
    p, expected = 0.3, 0.0
    for group in itertools.product([0.0, 1.0], repeat=4):
        rewards = np.array(group)
        probability = float(np.prod(np.where(rewards == 1, p, 1 - p)))
        expected += probability * float((pass_at_k(rewards, 2) * np.where(rewards == 1, 1 - p, -p)).mean())
    assert expected == pytest.approx(2 * (1 - p) * p * (1 - p))


def test_pass_at_k_leaves_nearly_solved_problems_alone() -> None:
    # With at most one failure, every subset of 2 of the others holds a success whatever one of them does.
    np.testing.assert_allclose(pass_at_k(np.array([1.0, 1.0, 1.0, 0.0]), 2), 0, atol=1e-12)
    assert np.abs(pass_at_k(np.array([1.0, 0.0, 0.0, 0.0]), 2)).min() > 0.3


CONFIGURED: list[tuple[Advantage, OfGroup]] = [
    (GroupMeanAdvantage(), group_mean),
    (GroupNormalizedAdvantage(kind="group_normalized"), group_normalized),
    (RlooAdvantage(kind="rloo"), rloo),
    (PassAtKAdvantage(kind="pass_at_k", k=3), lambda rewards_G: pass_at_k(rewards_G, 3)),
    (LengthControlledAdvantage(kind="length_controlled", alpha=0.4),
     lambda rewards_G: length_controlled(rewards_G, np.array([2.0, 5.0, 3.0, 9.0]), 0.4)),
]  # fmt: skip


def test_every_advantage_of_the_configuration_is_tried_here() -> None:
    kinds = {type(config) for config, _ in CONFIGURED} | {ReinforcePlusPlusAdvantage}
    assert kinds == set(get_args(get_args(Advantage)[0]))


@pytest.mark.parametrize(("config", "of_group"), CONFIGURED, ids=[config.kind for config, _ in CONFIGURED])
def test_the_configured_advantage_is_taken_in_each_group(config: Advantage, of_group: OfGroup) -> None:
    group = make_group(0, [make_trajectory(spans=[(0, length)]) for length in (2, 5, 3, 9)])
    rewards = [np.array([1.0, 0.0, 1.0, 0.5]), np.array([NAN, 0.0, 2.0, 0.5])]
    for given_rewards, result in zip(rewards, advantages(config, [group, group], rewards), strict=True):
        np.testing.assert_array_equal(result, of_group(given_rewards))
    assert is_groupwise(config)


def test_only_the_deviation_of_the_step_needs_the_whole_step() -> None:
    config = ReinforcePlusPlusAdvantage(kind="reinforce_plus_plus")
    rewards = [np.array([1.0, 0.0]), np.array([0.0, 4.0])]
    group = make_group(0, [make_trajectory(), make_trajectory()])
    for result, expected in zip(advantages(config, [group, group], rewards), reinforce_plus_plus(rewards), strict=True):
        np.testing.assert_array_equal(result, expected)
    assert not is_groupwise(config)


def test_lengths_keep_the_order_of_the_group() -> None:
    group = make_group(0, [make_trajectory(spans=[(0, 2), (1, 3)]), make_trajectory(spans=[(1, 1)])])
    np.testing.assert_array_equal(lengths_of(group), [5, 1])


@pytest.mark.parametrize(
    ("rewards", "constant"),
    [([1, 1], True), ([1, 0], False), ([1, NAN, 1], True), ([1, NAN, 0], False), ([1, NAN], True), ([NAN, NAN], True)],
)
def test_a_group_is_constant_when_its_valid_rewards_are_equal(rewards: list[float], constant: bool) -> None:
    assert is_constant(np.array(rewards, dtype=np.float64)) is constant


def test_rewards_keep_the_order_of_the_group_and_mark_failed_scores() -> None:
    group = make_group(0, [make_trajectory(reward=reward) for reward in (0.25, NAN, 1.0)])
    np.testing.assert_array_equal(rewards_of(group), [0.25, NAN, 1.0])
