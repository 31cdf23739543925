import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algorithms.second_moment import m2po, outward_log_ratios, second_moment_threshold
from tests.rlsys.algorithms.builders import gradient, make_tokens, random_tokens, values


def test_the_largest_are_masked_until_the_mean_square_is_small_enough() -> None:
    # Squares 0.01, 0.04, 0.09, 0.16, 1; running means 0.01, 0.025, 0.0467, 0.075, 0.26. τ = 0.05 keeps three:
    # the threshold lies half-way between 0.3 and 0.4.
    log_ratios = values(0.4, -0.1, 1.0, 0.3, -0.2)
    assert second_moment_threshold(log_ratios, 0.05) == pytest.approx(0.35)
    assert second_moment_threshold(log_ratios, 0.3) == math.inf
    assert second_moment_threshold(log_ratios, 0.005) == pytest.approx(0.05)


def test_equal_log_ratios_go_together() -> None:
    # Squares 0.01, 0.09, 0.09: the mean of the first two is 0.05, of all 0.0633. No two tokens that moved equally far
    # are treated differently, so both are masked.
    assert second_moment_threshold(values(0.3, -0.3, 0.1), 0.055) == pytest.approx(0.2)


def test_a_step_without_outward_tokens_masks_nothing() -> None:
    assert second_moment_threshold(torch.zeros(0), 0.04) == math.inf


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30), st.floats(1e-3, 2), st.randoms())
def test_the_kept_tokens_obey_the_bound_and_no_further_one_could_be_kept(
    log_ratios: list[float], tau: float, random: object
) -> None:
    threshold = second_moment_threshold(torch.tensor(log_ratios, dtype=torch.float64), tau)
    kept = [x for x in log_ratios if abs(x) <= threshold]
    masked = sorted(abs(x) for x in log_ratios if abs(x) > threshold)
    assert not kept or sum(x * x for x in kept) / len(kept) <= tau * (1 + 1e-12)
    if masked:
        ties = [x for x in masked if x * x <= masked[0] ** 2]
        more = [*kept, *ties]
        assert sum(x * x for x in more) / len(more) > tau * (1 - 1e-12)
    shuffled = list(log_ratios)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert second_moment_threshold(torch.tensor(shuffled, dtype=torch.float64), tau) == threshold


def test_only_tokens_that_move_in_the_direction_of_their_advantage_count() -> None:
    # log ρ = 0.5, 0.5, -0.5, -0.5, 0.5 with A = 1, -1, 1, -1, 0: outward are the first and the fourth
    behavior = values(-2, -2, -1, -1, -2)
    tokens = make_tokens(behavior + values(0.5, 0.5, -0.5, -0.5, 0.5), behavior, values(1, -1, 1, -1, 0))
    torch.testing.assert_close(outward_log_ratios(tokens), values(0.5, 0.5))
    # -ρA: 0, 1.6487, -0.6065, 0, 0
    loss = m2po(tokens, threshold=0.4)
    torch.testing.assert_close(loss.loss, values(0, math.exp(0.5), -math.exp(-0.5), 0, 0))
    assert loss.diagnostics["clipped"].tolist() == [1, 0, 0, 1, 0]
    torch.testing.assert_close(gradient(lambda t: m2po(t, threshold=0.4), tokens), loss.loss)
    assert m2po(tokens, threshold=0.6).diagnostics["clipped"].sum() == 0
    assert m2po(tokens, threshold=math.inf).diagnostics["clipped"].sum() == 0


def test_the_threshold_does_not_depend_on_micro_batches_and_ranks() -> None:
    tokens = random_tokens(3, completions=12)
    whole = second_moment_threshold(outward_log_ratios(tokens), 0.04)
    assert 0 < whole < 1
    fields = (tokens.logprobs, tokens.behavior_logprobs, tokens.advantages, tokens.mask)
    size = len(tokens.mask)
    for cuts in ([0, size], [0, 5, 17, size], list(range(size + 1))):
        parts = [
            outward_log_ratios(make_tokens(*(field[start:end] for field in fields))) for start, end in pairwise(cuts)
        ]
        assert second_moment_threshold(torch.cat(parts[::-1]), 0.04) == whole


def test_masked_tokens_do_not_count_in_the_second_moment() -> None:
    tokens = make_tokens(values(-1, math.nan, 0), values(-2, 0, -math.inf), values(1, 1, 1), values(1, 0, 0))
    assert outward_log_ratios(tokens).tolist() == [1]
