"""Accuracy with intervals that count problems, not samples."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlsys.evaluation.accuracy import EvaluationResult, Interval, clustered_accuracy, evaluate_texts, wilson_interval
from rlsys.types import Problem


@pytest.mark.parametrize(("right", "n", "low", "high"), [
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score): 81/263, 15/148, 0/20, 1/29.
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
])  # fmt: skip
def test_wilson_intervals_agree_with_the_published_ones(right: int, n: int, low: float, high: float) -> None:
    interval = wilson_interval(right / n, n)
    assert interval == pytest.approx((low, high), abs=5e-5)


def test_the_accuracy_is_the_mean_over_problems_of_their_shares() -> None:
    # 1, 1/2 and 0: the third problem's four samples weigh as much as the first one's two.
    accuracy, _ = clustered_accuracy([[True, True], [True, False], [False] * 4])
    assert accuracy == 0.5


def test_the_effective_number_of_samples_follows_from_the_spread_between_problems() -> None:
    # Shares 1 and 1/2: mean 3/4, sample variance 1/8, of the mean 1/16; n_eff = (3/4 * 1/4) / (1/16) = 3.
    _, interval = clustered_accuracy([[True, True], [True, False]])
    assert interval == wilson_interval(0.75, 3)


def test_repeating_every_sample_narrows_nothing() -> None:
    once = [[index % 3 == 0] for index in range(30)]
    assert clustered_accuracy([samples * 4 for samples in once]) == clustered_accuracy(once)


def test_the_interval_is_never_narrower_than_that_of_independent_samples() -> None:
    # One of two right everywhere: no spread at all, so the cap of 20 samples decides.
    assert clustered_accuracy([[True, False]] * 10)[1] == wilson_interval(0.5, 20)
    # Shares 1/2 nine times and 1 once: mean 0.55, squares 0.225, variance of the mean 0.0025; 0.2475 / 0.0025 is 99.
    assert clustered_accuracy([[True, False]] * 9 + [[True, True]])[1] == wilson_interval(0.55, 20)


@pytest.mark.parametrize("right", [True, False])
def test_where_everything_is_alike_each_problem_counts_once_and_the_interval_keeps_a_width(right: bool) -> None:
    accuracy, interval = clustered_accuracy([[right] * 4] * 20)
    # Wilson's 0 of 20 reaches to 0.1611 (see above), and its mirror image down to 0.8389.
    assert accuracy == right
    assert interval == pytest.approx((0.8389, 1.0) if right else (0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize("alpha", [0.4, 4.0])
def test_intervals_cover_the_truth_about_19_times_in_20(alpha: float) -> None:
    # Problems of different difficulty (beta-distributed, mean 0.8), four samples of each.
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        difficulty_P = generator.beta(alpha, alpha / 4, size=100)
        correct_PK = generator.random((100, 4)) < difficulty_P[:, None]
        _, interval = clustered_accuracy(correct_PK.tolist())
        covered += interval.low <= 0.8 <= interval.high
    # 475 of 500 expected, standard deviation 4.9.
    assert 460 <= covered <= 490


# ---------------------------------------------------------------- texts

PROBLEMS = [Problem(name, "Which?", (), name, "") for name in ("melanoma", "glioma")]


def written(answer: str) -> str:
    return f"<think>x</think>\nAnswer: {answer}"


def test_texts_are_judged_by_the_answer_reward_and_unreadable_ones_are_counted() -> None:
    result = evaluate_texts(
        PROBLEMS,
        sampled_texts=[[written("Melanoma"), "melanoma"], [written("melanoma"), written("glioma or melanoma")]],
        greedy_texts=[written("melanoma"), written("melanoma")],
        floor=0.25,
    )
    # Shares 1/2 and 0; the bare word is unreadable and wrong.
    assert (result.accuracy, result.greedy_accuracy, result.parse_failures) == (0.25, 0.5, 1)
    assert (result.n, result.samples, result.floor) == (2, 4, 0.25)
    assert result.interval == clustered_accuracy([[True, False], [False, False]])[1]
    assert result.greedy_interval == wilson_interval(0.5, 2)


def test_every_problem_needs_its_texts() -> None:
    with pytest.raises(ValueError, match="zip"):
        evaluate_texts(PROBLEMS, [[written("x")]], [written("x")], floor=0)


def test_a_result_comes_back_from_json() -> None:
    result = EvaluationResult(0.9, Interval(0.88, 0.92), 0.95, Interval(0.9, 0.97), 300, 1200, 0.1, 3)
    assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
