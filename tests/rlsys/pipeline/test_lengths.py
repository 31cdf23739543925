"""Length bias: exact numbers over a window, and an error that says how much of it is noise."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.pipeline.lengths import LengthLog

STEPS = st.lists(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 40), min_size=1, max_size=5)), max_size=5), max_size=8
)
"""Steps of groups: (whether it was trained, lengths)."""


def play(log: LengthLog, steps: list[list[tuple[bool, list[int]]]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for groups in steps:
        for is_trained, lengths in groups:
            log.generated(lengths)
            if is_trained:
                log.trained(lengths)
        metrics = log.end_step()
    return metrics


def test_the_bias_compares_the_means() -> None:
    log = LengthLog()
    log.generated([10, 20])
    log.generated([30, 60])
    log.trained([10])
    log.trained([20])
    metrics = log.end_step()
    # Means 120 / 4 = 30 and 30 / 2 = 15. Ranks of 4: p50 the 2nd, p95 the 4th; of 2: the 1st and the 2nd.
    # Errors: of the generated sqrt(2 / 1 * ((30 - 60)² + (90 - 60)²)) / 4 = 15, of the trained
    # sqrt(2 / 1 * ((10 - 15)² + (20 - 15)²)) / 2 = 5, so of the bias 0.5 * sqrt((5 / 15)² + (15 / 30)²) = 0.30046.
    assert metrics == {
        "length/generated_mean": 30.0,
        "length/generated_p50": 20.0,
        "length/generated_p95": 60.0,
        "length/trained_mean": 15.0,
        "length/trained_p50": 10.0,
        "length/trained_p95": 20.0,
        "length/bias": -0.5,
        "length/bias_error": pytest.approx(0.30046, rel=1e-4),
    }


@given(STEPS, st.integers(1, 4))
def test_the_numbers_are_those_of_the_lists_of_the_window(
    steps: list[list[tuple[bool, list[int]]]], window: int
) -> None:
    metrics = play(LengthLog(window), steps)
    means: dict[str, float] = {}
    for name, groups in (
        ("generated", [lengths for step in steps[-window:] for _, lengths in step]),
        ("trained", [lengths for step in steps[-window:] for is_trained, lengths in step if is_trained]),
    ):
        lengths = [length for group in groups for length in group]
        if not lengths:
            assert f"length/{name}_mean" not in metrics
            continue
        means[name] = float(np.mean(lengths))
        assert metrics[f"length/{name}_mean"] == pytest.approx(means[name])
        for share in (50, 95):
            expected = np.percentile(lengths, share, method="inverted_cdf")
            assert metrics[f"length/{name}_p{share}"] == expected
    if "length/bias" in metrics:
        assert metrics["length/bias"] == pytest.approx(means["trained"] / means["generated"] - 1)


def test_one_group_is_too_little_to_tell_a_bias() -> None:
    log = LengthLog()
    log.generated([10, 20])
    log.generated([30, 60])
    assert "length/bias" not in log.end_step()
    log.trained([10, 20])
    metrics = log.end_step()
    assert metrics["length/trained_mean"] == 15.0
    assert "length/bias" not in metrics
    log.trained([30, 60])
    assert log.end_step()["length/bias"] == 0.0


def test_the_error_is_that_of_groups_whose_completions_are_alike() -> None:
    # 400 independent runs of 60 generated and 40 trained groups of 8, half of the variance shared within a group: the
    # bias scatters as much as its error says. Counting completions would say less than half of that.
    random = np.random.default_rng(0)

    def group() -> list[int]:
        return [round(length) for length in 200 + 20 * random.normal() + 20 * random.normal(size=8)]

    biases: list[float] = []
    errors: list[float] = []
    for _ in range(400):
        log = LengthLog()
        for _ in range(60):
            log.generated(group())
        for _ in range(40):
            log.trained(group())
        metrics = log.end_step()
        biases.append(metrics["length/bias"])
        errors.append(metrics["length/bias_error"])
    assert np.mean(errors) == pytest.approx(np.std(biases), rel=0.12)
    assert abs(np.mean(biases)) < 4 * np.std(biases) / np.sqrt(400)


def test_what_a_step_is_told_is_forgotten_after_the_window() -> None:
    log = LengthLog(window=2)
    log.generated([100])
    assert log.end_step()["length/generated_mean"] == 100.0
    log.generated([10])
    assert log.end_step()["length/generated_mean"] == 55.0
    assert log.end_step()["length/generated_mean"] == 10.0
    assert log.end_step() == {}


def test_empty_completions_have_no_bias() -> None:
    log = LengthLog()
    for _ in range(2):
        log.generated([0, 0])
        log.trained([0, 0])
    assert "length/bias" not in log.end_step()


@given(STEPS, st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), max_size=3), STEPS)
def test_a_restored_log_goes_on_as_the_one_that_was_saved(
    before: list[list[tuple[bool, list[int]]]], begun: list[list[int]], after: list[list[tuple[bool, list[int]]]]
) -> None:
    whole, restored = LengthLog(3), LengthLog(3)
    play(whole, before)
    for lengths in begun:
        whole.generated(lengths)
    restored.restore(json.loads(json.dumps(whole.state())))
    after = [[], *after]
    assert play(restored, after) == play(whole, after)


def test_a_step_of_many_completions_is_kept_as_small_as_its_lengths_differ() -> None:
    log = LengthLog()
    for _ in range(2_000):
        log.generated(np.arange(16))
    log.end_step()
    assert len(json.dumps(log.state())) < 1_000
