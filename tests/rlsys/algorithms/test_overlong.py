"""DAPO's soft over-long punishment, against numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.overlong import over_long_penalty


def test_the_penalty_rises_over_the_buffer() -> None:
    # Limit 100, buffer 20: free up to 80; 85 is 5/20 into the buffer, 90 half, 100 (truncated) all of it.
    penalties = over_long_penalty([1, 79, 80, 85, 90, 99, 100], max_new_tokens=100, buffer_tokens=20, weight=1.0)
    np.testing.assert_allclose(penalties, [0, 0, 0, -0.25, -0.5, -0.95, -1.0], rtol=1e-12)
    assert penalties.dtype == np.float64
    assert not np.signbit(penalties[:3]).any()


def test_the_weight_scales_it() -> None:
    # 15 of 16 tokens with a buffer of 4: 3/4 of the buffer, times 0.5.
    np.testing.assert_array_equal(
        over_long_penalty([12, 15, 16], max_new_tokens=16, buffer_tokens=4, weight=0.5), [0, -0.375, -0.5]
    )


def test_a_buffer_of_the_whole_limit_makes_every_token_cost() -> None:
    np.testing.assert_array_equal(
        over_long_penalty([0, 1, 2, 4], max_new_tokens=4, buffer_tokens=4, weight=1.0), [0, -0.25, -0.5, -1.0]
    )


@pytest.mark.parametrize("buffer_tokens", [0, 11])
def test_a_buffer_lies_within_the_limit(buffer_tokens: int) -> None:
    with pytest.raises(AssertionError, match=f"a buffer of {buffer_tokens} tokens in 10"):
        over_long_penalty([5], max_new_tokens=10, buffer_tokens=buffer_tokens, weight=1.0)


@given(st.integers(1, 300), st.data(), st.floats(0.01, 10))
def test_it_is_the_formula_of_the_paper(limit: int, data: st.DataObject, weight: float) -> None:
    buffer = data.draw(st.integers(1, limit))
    lengths = list(range(limit + 1))
    expected = [0.0 if y <= limit - buffer else weight * ((limit - buffer) - y) / buffer for y in lengths]
    penalties = over_long_penalty(lengths, max_new_tokens=limit, buffer_tokens=buffer, weight=weight)
    np.testing.assert_allclose(penalties, expected, rtol=1e-12)
