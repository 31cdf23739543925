"""Trajectories and demonstrations -> `TrainSample`: what the learner's loss reads, one sequence each.

Stands between the buffer (or the warm start's data) and packing. A sample carries the ticket of its group and the
weight of its tokens in the step's sum, so that nothing later needs its place in a list or the rest of the batch.

Invariant: every token of a sample's continuation has a log-probability, a version, a mask value; what does not count in
the loss is left out here, and `tokens_in_loss` says how many tokens are left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlsys.algorithms.aggregation import Aggregation, sample_weights
from rlsys.types import Completion, FinishReason, IntArray, Prompt, TrainSample, Trajectory, TrajectoryGroup


def batch_samples(
    groups: Sequence[TrajectoryGroup],
    advantages: Sequence[NDArray[np.float64]],
    *,
    aggregation: Aggregation,
    num_trajectories: int,
    max_new_tokens: int,
    mask_truncated: bool = False,
) -> list[TrainSample]:
    """Return a sample for each trajectory of `groups` that counts, in their order, with its group's `advantages`.

    What does not count (`is_trained`) is left out whole: a sample of masked tokens would cost a forward pass and change
    nothing. `num_trajectories` is that of the whole step, also where `groups` are only a part of it (streaming).
    """
    counting: list[tuple[TrajectoryGroup, Trajectory, float]] = []
    for group, advantages_G in zip(groups, advantages, strict=True):
        assert len(advantages_G) == len(group.trajectories), (
            f"group {group.ticket}: {len(advantages_G)} advantages for {len(group.trajectories)} trajectories"
        )
        for trajectory, advantage in zip(group.trajectories, advantages_G, strict=True):
            if not is_trained(trajectory, mask_truncated=mask_truncated):
                continue
            assert np.isfinite(advantage), f"group {group.ticket}: a valid trajectory has the advantage {advantage}"
            counting.append((group, trajectory, float(advantage)))
    lengths = [len(trajectory.completion.token_ids_T) for _, trajectory, _ in counting]
    weights = sample_weights(
        lengths,
        aggregation,
        num_trajectories=num_trajectories,
        max_new_tokens=max_new_tokens,
        step_tokens=sum(lengths),
    )
    return [
        _sample(group, trajectory.completion, advantage, weight)
        for (group, trajectory, advantage), weight in zip(counting, weights, strict=True)
    ]


def is_trained(trajectory: Trajectory, *, mask_truncated: bool) -> bool:
    """Whether a trajectory becomes a sample: it can be used, and `mask_truncated` does not leave it out."""
    is_truncated = trajectory.completion.finish_reason is FinishReason.LENGTH
    return is_usable(trajectory) and not (mask_truncated and is_truncated)


def is_usable(trajectory: Trajectory) -> bool:
    """Whether anything can be learned from a trajectory: its score is valid, its log-probabilities are finite."""
    return trajectory.score.is_valid and trajectory.completion.has_finite_logprobs


def _sample(group: TrajectoryGroup, completion: Completion, advantage: float, weight: float) -> TrainSample:
    return TrainSample(
        group=group.ticket,
        prompt=group.prompt,
        continuation_ids_T=completion.token_ids_T,
        behavior_logprobs_T=completion.behavior_logprobs_T,
        versions_T=token_versions(completion),
        loss_mask_T=np.ones(len(completion.token_ids_T), dtype=np.float32),
        advantage=advantage,
        token_weight=weight,
    )


def demonstration_samples(rendered: Sequence[tuple[Prompt, Sequence[int]]]) -> list[TrainSample]:
    """Return the samples in which SFT imitates continuations (end token included); a row's number stands for the group.

    Their loss is the mean over all tokens of the batch.
    """
    weight = 1.0 / max(1, sum(len(ids) for _, ids in rendered))
    samples: list[TrainSample] = []
    for row, (prompt, ids) in enumerate(rendered):
        samples.append(
            TrainSample(
                group=row,
                prompt=prompt,
                continuation_ids_T=np.array(ids, dtype=np.int64),
                behavior_logprobs_T=np.zeros(len(ids), dtype=np.float32),
                versions_T=np.zeros(len(ids), dtype=np.int64),
                loss_mask_T=np.ones(len(ids), dtype=np.float32),
                advantage=1.0,
                token_weight=weight,
            )
        )
    return samples


def token_versions(completion: Completion) -> IntArray:
    """Return versions_T, the policy version that sampled each token."""
    versions_T = np.full(len(completion.token_ids_T), -1, dtype=np.int64)
    for span in completion.version_spans:
        versions_T[span.start : span.end] = span.version
    assert versions_T.min(initial=0) >= 0, f"version spans {completion.version_spans} leave out tokens"
    return versions_T


def tokens_in_loss(batch: Sequence[TrajectoryGroup], samples: Sequence[TrainSample]) -> dict[int, int]:
    """Return for the ticket of each group in `batch` how many of its tokens count in the loss; 0 where none does."""
    tokens = {group.ticket: 0 for group in batch}
    for sample in samples:
        tokens[sample.group] += int(np.count_nonzero(sample.loss_mask_T))
    return tokens
