"""Trajectories and demonstrations -> `TrainSample`: what the learner's loss reads, one sequence each.

Stands between the buffer (or the warm start's data) and packing. A sample carries the ticket of its group, so that
nothing later needs its place in a list.

Invariant: every token of a sample's continuation has a log-probability, a version, a mask value; what does not count in
the loss is left out here, and `tokens_in_loss` says how many tokens are left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlsys.types import Completion, FinishReason, IntArray, Prompt, TrainSample, TrajectoryGroup


def group_samples(
    group: TrajectoryGroup, advantages_G: NDArray[np.float64], *, mask_truncated: bool = False
) -> list[TrainSample]:
    """Return a sample for each trajectory of `group` that counts, in their order.

    Trajectories without a valid score do not count; with `mask_truncated`, neither do completions that were cut at the
    token limit. They are left out whole: a sample of masked tokens would cost a forward pass and change nothing.
    """
    assert len(advantages_G) == len(group.trajectories), (
        f"group {group.ticket}: {len(advantages_G)} advantages for {len(group.trajectories)} trajectories"
    )
    samples: list[TrainSample] = []
    for trajectory, advantage in zip(group.trajectories, advantages_G, strict=True):
        completion = trajectory.completion
        is_truncated = completion.finish_reason is FinishReason.LENGTH
        if not trajectory.score.is_valid or (mask_truncated and is_truncated):
            continue
        assert np.isfinite(advantage), f"group {group.ticket}: a valid trajectory has the advantage {advantage}"
        samples.append(
            TrainSample(
                group=group.ticket,
                prompt=group.prompt,
                continuation_ids_T=completion.token_ids_T,
                behavior_logprobs_T=completion.behavior_logprobs_T,
                versions_T=token_versions(completion),
                loss_mask_T=np.ones(len(completion.token_ids_T), dtype=np.float32),
                advantage=float(advantage),
            )
        )
    return samples


def demonstration_sample(row: int, prompt: Prompt, continuation_ids: Sequence[int]) -> TrainSample:
    """Return the sample in which SFT imitates `continuation_ids` (end token included); `row` stands for the group."""
    length = len(continuation_ids)
    return TrainSample(
        group=row,
        prompt=prompt,
        continuation_ids_T=np.array(continuation_ids, dtype=np.int64),
        behavior_logprobs_T=np.zeros(length, dtype=np.float32),
        versions_T=np.zeros(length, dtype=np.int64),
        loss_mask_T=np.ones(length, dtype=np.float32),
        advantage=1.0,
    )


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
