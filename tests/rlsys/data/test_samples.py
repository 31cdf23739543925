import numpy as np
import pytest

from rlsys.algorithms.aggregation import Aggregation
from rlsys.data.samples import batch_samples, demonstration_samples, token_versions, tokens_in_loss
from rlsys.types import FinishReason, Prompt, TrainSample, TrajectoryGroup
from tests.rlsys.groups import make_group, make_trajectory

NAN = float("nan")


def group_samples(group: TrajectoryGroup, advantages_G: np.ndarray, mask_truncated: bool = False) -> list[TrainSample]:
    """The samples of a step of one group."""
    return batch_samples(
        [group], [advantages_G], aggregation="token_mean", num_trajectories=len(advantages_G), max_new_tokens=10,
        mask_truncated=mask_truncated,
    )  # fmt: skip


def test_a_sample_holds_the_tokens_of_its_trajectory_and_the_ticket_of_its_group() -> None:
    group = make_group(7, [make_trajectory([(3, 2), (4, 1)]), make_trajectory([(4, 1)])])
    first, second = group_samples(group, np.array([0.5, -0.5]))
    assert (first.group, first.prompt, first.advantage, second.advantage) == (7, group.prompt, 0.5, -0.5)
    assert first.continuation_ids_T.tolist() == [100, 101, 102]
    assert first.behavior_logprobs_T.tolist() == np.array([-0.1, -0.2, -0.3], dtype=np.float32).tolist()
    assert first.versions_T.tolist() == [3, 3, 4]
    assert first.loss_mask_T.tolist() == [1, 1, 1]
    assert first.num_tokens == 5 + 3


def test_a_trajectory_without_a_valid_score_is_left_out_and_the_others_keep_their_advantages() -> None:
    group = make_group(0, [make_trajectory([(0, n)], reward) for n, reward in [(1, 1.0), (2, NAN), (3, 0.0)]])
    samples = group_samples(group, np.array([0.5, NAN, -0.5]))
    assert [(len(sample.continuation_ids_T), sample.advantage) for sample in samples] == [(1, 0.5), (3, -0.5)]


@pytest.mark.parametrize(("mask_truncated", "lengths"), [(False, [1, 2]), (True, [1])])
def test_truncated_completions_stay_unless_they_are_masked(mask_truncated: bool, lengths: list[int]) -> None:
    cut = make_trajectory([(0, 2)], finish_reason=FinishReason.LENGTH)
    group = make_group(0, [make_trajectory([(0, 1)]), cut])
    samples = group_samples(group, np.zeros(2), mask_truncated=mask_truncated)
    assert [len(sample.continuation_ids_T) for sample in samples] == lengths


def test_a_valid_trajectory_without_an_advantage_is_refused() -> None:
    with pytest.raises(AssertionError, match="group 3: a valid trajectory has the advantage nan"):
        group_samples(make_group(3, [make_trajectory()]), np.array([NAN]))


def test_every_trajectory_needs_an_advantage() -> None:
    with pytest.raises(AssertionError, match="group 3: 1 advantages for 2 trajectories"):
        group_samples(make_group(3, [make_trajectory(), make_trajectory()]), np.array([0.0]))


def test_version_spans_that_leave_out_tokens_are_refused() -> None:
    completion = make_trajectory([(1, 2), (2, 2)]).completion
    object.__setattr__(completion, "version_spans", completion.version_spans[:1])
    with pytest.raises(AssertionError, match="leave out tokens"):
        token_versions(completion)


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("token_mean", [1 / 6, 1 / 6, 1 / 6]),  # 1 + 2 + 3 tokens count
        ("sequence_mean", [1 / (4 * 1), 1 / (4 * 2), 1 / (4 * 3)]),  # 4 trajectories were taken, 3 count
        ("constant", [1 / (4 * 10)] * 3),
    ],
)
def test_every_sample_carries_its_weight_in_the_step(aggregation: Aggregation, weights: list[float]) -> None:
    first = make_group(0, [make_trajectory([(0, 1)]), make_trajectory([(0, 5)], NAN)])
    second = make_group(1, [make_trajectory([(0, 2)]), make_trajectory([(0, 3)])])
    samples = batch_samples(
        [first, second], [np.array([0.0, NAN]), np.zeros(2)], aggregation=aggregation, num_trajectories=4,
        max_new_tokens=10,
    )  # fmt: skip
    assert [sample.token_weight for sample in samples] == pytest.approx(weights)


def test_demonstrations_count_whole_with_advantage_1_and_equal_tokens() -> None:
    prompt = Prompt("p", (1, 2), ())
    first, second = demonstration_samples([(prompt, [8, 9]), (prompt, [7, 7, 7])])
    assert (first.group, second.group, first.advantage, first.num_tokens) == (0, 1, 1.0, 4)
    assert first.continuation_ids_T.tolist() == [8, 9]
    assert first.loss_mask_T.tolist() == [1, 1]
    assert first.behavior_logprobs_T.tolist() == first.versions_T.tolist() == [0, 0]
    assert first.token_weight == second.token_weight == 1 / 5


def test_tokens_in_the_loss_are_counted_for_every_group_of_the_batch() -> None:
    mixed = make_group(5, [make_trajectory([(0, 4)]), make_trajectory([(0, 2)], NAN), make_trajectory([(0, 1)])])
    nothing = make_group(6, [make_trajectory([(0, 9)], NAN)])
    samples = group_samples(mixed, np.zeros(3)) + group_samples(nothing, np.array([NAN]))
    assert tokens_in_loss([mixed, nothing], samples) == {5: 5, 6: 0}
