from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algorithms.aggregation import Aggregation, is_streamable, sample_weights
from rlsys.config_grpo import GrpoConfig

KINDS: tuple[Aggregation, ...] = get_args(Aggregation)
LOSSES = [[1.0, 2.0, 3.0], [10.0], [4.0, 6.0]]
"""Token losses of three completions of a step that took four trajectories; one of them did not count."""


def aggregate(kind: Aggregation, losses: list[list[float]]) -> float:
    sizes = [len(of_sample) for of_sample in losses]
    weights = sample_weights(sizes, kind, num_trajectories=4, max_new_tokens=5, step_tokens=sum(sizes))
    return sum(weight * sum(of_sample) for weight, of_sample in zip(weights, losses, strict=True))


def test_token_mean_is_the_mean_over_all_tokens() -> None:
    assert aggregate("token_mean", LOSSES) == pytest.approx(26 / 6)


def test_sequence_mean_is_the_mean_over_trajectories_of_their_means() -> None:
    # Means 2, 10, 5, and 0 for the one that does not count
    assert aggregate("sequence_mean", LOSSES) == pytest.approx((2 + 10 + 5 + 0) / 4)


def test_constant_divides_by_what_the_step_could_have_held() -> None:
    assert aggregate("constant", LOSSES) == pytest.approx(26 / (4 * 5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_tokens_has_no_weight(kind: Aggregation) -> None:
    assert aggregate(kind, [*LOSSES, []]) == aggregate(kind, LOSSES)
    assert sample_weights([0, 0], kind, num_trajectories=2, max_new_tokens=5, step_tokens=0) == [0, 0]


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=20), st.data())
def test_streamed_weights_are_those_of_the_whole_step(sizes: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(sizes) - 1))
    for kind in KINDS:
        if is_streamable(kind):
            whole, first, rest = (
                sample_weights(part, kind, num_trajectories=len(sizes), max_new_tokens=30)
                for part in (sizes, sizes[:cut], sizes[cut:])
            )
            assert whole == first + rest


def test_a_mean_over_tokens_needs_the_whole_step() -> None:
    assert [is_streamable(kind) for kind in KINDS] == [False, True, True]
    with pytest.raises(AssertionError, match="whole step"):
        sample_weights([3], "token_mean", num_trajectories=1, max_new_tokens=5)
    with pytest.raises(AssertionError, match="2 tokens in a step with 3"):
        sample_weights([3], "token_mean", num_trajectories=1, max_new_tokens=5, step_tokens=2)


def test_the_kinds_are_those_of_the_configuration() -> None:
    assert GrpoConfig.model_fields["aggregation"].annotation == Aggregation
