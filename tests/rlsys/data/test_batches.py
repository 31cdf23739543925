"""From groups to samples by the configured algorithm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlsys.config_grpo import GrpoConfig
from rlsys.data.batches import BatchMaker, pass_rate
from rlsys.pipeline.ledger import DropReason
from rlsys.types import FinishReason, Score, Trajectory, TrajectoryGroup
from tests.rlsys.groups import make_group, make_trajectory

NAN = float("nan")


def maker(**grpo: Any) -> BatchMaker:
    config = {"steps": 1, "groups_per_step": 2, "group_size": 2, **grpo}
    return BatchMaker(GrpoConfig.model_validate(config), max_new_tokens=10)


def group(*rewards: float, tokens: int = 3) -> TrajectoryGroup:
    return make_group(0, [make_trajectory([(0, tokens)], reward) for reward in rewards])


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ((1.0, 0.0), None),
        ((1.0, 1.0), DropReason.FILTERED),
        ((1.0, NAN), DropReason.FAILED),  # one reward has nothing to be compared with
        ((1.0, 1.0, NAN), DropReason.FILTERED),
    ],
)
def test_a_group_that_teaches_nothing_is_dropped_with_its_reason(
    rewards: tuple[float, ...], reason: DropReason | None
) -> None:
    assert maker().reason_to_drop(group(*rewards)) is reason


def with_logprob(value: float, reward: float) -> Trajectory:
    """A trajectory with `value` for the log-probability of its second token."""
    good = make_trajectory(reward=reward)
    logprobs_T = good.completion.behavior_logprobs_T.copy()
    logprobs_T[1] = value
    return replace(good, completion=replace(good.completion, behavior_logprobs_T=logprobs_T))


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_a_completion_of_which_a_probability_is_unknown_counts_as_one_without_a_score(value: float) -> None:
    bad = with_logprob(value, reward=0.0)
    one = make_group(0, [make_trajectory(reward=1.0), bad, make_trajectory(reward=0.5)])
    batch = maker().make([one])
    assert maker().reason_to_drop(one) is None
    np.testing.assert_array_equal(batch.advantages[0], [0.25, NAN, -0.25])
    assert [sample.advantage for sample in batch.samples] == [0.25, -0.25]
    assert all(np.isfinite(sample.behavior_logprobs_T).all() for sample in batch.samples)
    assert maker().reason_to_drop(make_group(0, [make_trajectory(), bad])) is DropReason.FAILED
    assert pass_rate(one) == 0.75
    assert pass_rate(make_group(0, [bad])) is None


def test_a_group_without_a_sample_is_dropped_although_its_rewards_differ() -> None:
    cut = [make_trajectory([(0, 10)], reward, FinishReason.LENGTH) for reward in (1.0, 0.0)]
    masking = maker(over_long={"kind": "mask"}, filter_zero_variance=False)
    assert masking.reason_to_drop(make_group(0, cut)) is DropReason.FILTERED
    assert masking.reason_to_drop(make_group(0, [*cut, make_trajectory()])) is None
    assert maker().reason_to_drop(make_group(0, cut)) is None
    # Usable and kept, or neither: no trajectory is both.
    neither = make_group(0, [*cut, with_logprob(NAN, reward=1.0)])
    assert masking.reason_to_drop(neither) is DropReason.FILTERED


@pytest.mark.parametrize("filtering", [True, False])
def test_a_group_teaches_nothing_by_the_signal_of_the_filter_be_it_filtered_or_not(filtering: bool) -> None:
    longer = make_group(0, [make_trajectory([(0, 8)], 1.0), make_trajectory([(0, 6)], 1.0)])
    penalise = {"kind": "penalise", "buffer_tokens": 4}
    assert maker(filter_zero_variance=filtering).teaches_nothing(longer)
    assert not maker(filter_zero_variance=filtering, over_long=penalise).teaches_nothing(longer)
    assert not maker(filter_zero_variance=filtering).teaches_nothing(group(1.0, 0.0))
    # Equal again by the penalty of the second: 1 - (8 - 6) / 4 = 0.5.
    equal = make_group(0, [make_trajectory([(0, 6)], 0.5), make_trajectory([(0, 8)], 1.0)])
    assert maker(filter_zero_variance=filtering, over_long=penalise).teaches_nothing(equal)
    cut = make_group(0, [make_trajectory([(0, 10)], reward, FinishReason.LENGTH) for reward in (1.0, 0.0)])
    assert maker(filter_zero_variance=filtering, over_long={"kind": "mask"}).teaches_nothing(cut)


def test_equal_rewards_are_kept_without_the_filter() -> None:
    assert maker(filter_zero_variance=False).reason_to_drop(group(1.0, 1.0)) is None


def test_a_penalty_for_length_makes_equal_rewards_differ() -> None:
    # Limit 10, buffer 4: free up to 6 tokens, then linear to -1 at 10. 8 tokens cost (8 - 6) / 4 = 0.5.
    one = make_group(0, [make_trajectory([(0, 8)], 1.0), make_trajectory([(0, 6)], 1.0)])
    penalising = maker(over_long={"kind": "penalise", "buffer_tokens": 4})
    assert penalising.rewards(one).tolist() == [0.5, 1.0]
    assert penalising.reason_to_drop(one) is None
    assert maker().reason_to_drop(one) is DropReason.FILTERED


def test_an_advantage_that_sees_more_than_rewards_decides_what_teaches() -> None:
    # All solved, one at greater length: nothing for the group mean, something where length counts among successes.
    one = make_group(0, [make_trajectory([(0, 2)], 1.0), make_trajectory([(0, 9)], 1.0)])
    assert maker().reason_to_drop(one) is DropReason.FILTERED
    assert maker(advantage={"kind": "length_controlled"}).reason_to_drop(one) is None
    # The best of two is solved whichever of the four is left out: nothing for max@2, something for the mean.
    nearly = group(1.0, 1.0, 1.0, 0.0)
    assert maker(group_size=4).reason_to_drop(nearly) is None
    assert maker(group_size=4, advantage={"kind": "pass_at_k", "k": 2}).reason_to_drop(nearly) is DropReason.FILTERED


def test_truncated_completions_count_in_the_mean_and_not_in_the_loss_where_they_are_masked() -> None:
    cut = make_trajectory([(0, 10)], 0.0, finish_reason=FinishReason.LENGTH)
    one = make_group(0, [make_trajectory([(0, 2)], 1.0), cut])
    batch = maker(over_long={"kind": "mask"}).make([one])
    assert batch.advantages[0].tolist() == [0.5, -0.5]
    assert [len(sample.continuation_ids_T) for sample in batch.samples] == [2]
    assert len(maker().make([one]).samples) == 2


def test_a_step_in_parts_gives_the_samples_of_the_step() -> None:
    groups = [make_group(k, [make_trajectory([(0, 2 + k)], 1.0), make_trajectory([(0, 5)], 0.0)]) for k in range(2)]
    streaming = maker(streaming=True, aggregation="sequence_mean")
    whole = streaming.make(groups).samples
    parts = [sample for one in groups for sample in streaming.make([one]).samples]
    assert [sample.token_weight for sample in parts] == [sample.token_weight for sample in whole]
    assert [sample.advantage for sample in parts] == [sample.advantage for sample in whole]


def test_the_configured_advantage_is_used() -> None:
    # Leave-one-out: each reward minus the mean of the others.
    rloo = maker(advantage={"kind": "rloo"}).make([group(1.0, 0.0, 0.0)])
    np.testing.assert_allclose(rloo.advantages[0], [1.0, -0.5, -0.5])


def test_the_pass_rate_is_the_mean_answer_of_what_could_be_scored() -> None:
    assert pass_rate(group(1.0, 0.0, 0.0, NAN)) == pytest.approx(1 / 3)
    assert pass_rate(group(NAN, NAN)) is None
    assert pass_rate(group(1.6, 1.2)) == 1.0
    assert pass_rate(group(0.0, -0.5)) == 0.0


def test_the_pass_rate_reads_the_answer_and_without_one_the_reward() -> None:
    trajectory = make_trajectory(reward=0.9)
    part = trajectory.score.parts["answer"]
    solved = Score({"answer": replace(part, value=1.0)}, reward=0.4)
    other = Score({"format": part}, reward=0.4)
    assert pass_rate(make_group(0, [replace(trajectory, score=solved)])) == 1.0
    assert pass_rate(make_group(0, [replace(trajectory, score=other)])) == 0.4


def test_a_token_weighs_by_the_trajectories_of_the_whole_step() -> None:
    # 2 groups of 2 completions of at most 10 tokens, of which only a part is here.
    (first, *_) = maker(aggregation="constant").make([group(1.0, 0.0)]).samples
    assert first.token_weight == 1 / (2 * 2 * 10)
