"""Groups -> what the learner trains on: rewards, whether a group teaches anything, advantages, samples.

Stands between the buffer and packing, in the controller's process. It computes from the numbers of groups alone and
keeps no state, so that a step gives the same samples whether its groups come all at once or in parts (streaming).

Invariant: what is left out of the loss is left out here, and is counted by whoever asked (`rlsys.pipeline.ledger`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsys.algorithms.advantages import advantages, is_constant, is_groupwise, rewards_of
from rlsys.algorithms.overlong import over_long_penalty
from rlsys.config_grpo import GrpoConfig, MaskOverLong, PenaliseOverLong
from rlsys.data.samples import batch_samples, is_trained, is_usable
from rlsys.pipeline.ledger import DropReason
from rlsys.types import TrainSample, TrajectoryGroup

ANSWER = "answer"
"""The reward part that says whether a problem was solved, where a run has it."""


@dataclass(frozen=True)
class Batch:
    """Groups of one step, or of a part of one."""

    groups: Sequence[TrajectoryGroup]
    advantages: Sequence[NDArray[np.float64]]
    """Of each group, in order; NaN for trajectories that cannot be used."""
    samples: Sequence[TrainSample]


class BatchMaker:
    """Applies the algorithm of a configuration to groups."""

    def __init__(self, config: GrpoConfig, max_new_tokens: int) -> None:
        self._config = config
        self._max_new_tokens = max_new_tokens
        self._mask_truncated = isinstance(config.over_long, MaskOverLong)

    def rewards(self, group: TrajectoryGroup) -> NDArray[np.float64]:
        """Return rewards_G as training sees them: penalised where completions are over-long, NaN where not usable.

        That is where a score is not valid, or a behavior log-probability not finite.
        """
        is_usable_G = [is_usable(trajectory) for trajectory in group.trajectories]
        rewards_G, over_long = np.where(is_usable_G, rewards_of(group), np.nan), self._config.over_long
        if not isinstance(over_long, PenaliseOverLong):
            return rewards_G
        lengths_G = np.array([len(trajectory.completion.token_ids_T) for trajectory in group.trajectories])
        return rewards_G + over_long_penalty(
            lengths_G,
            max_new_tokens=self._max_new_tokens,
            buffer_tokens=over_long.buffer_tokens,
            weight=over_long.weight,
        )

    def reason_to_drop(self, group: TrajectoryGroup) -> DropReason | None:
        """Return why a finished group is not worth training, or None."""
        if np.isfinite(self.rewards(group)).sum() < 2:
            return DropReason.FAILED
        if not self._has_samples(group) or (self._config.filter_zero_variance and self._is_constant(group)):
            return DropReason.FILTERED
        return None

    def teaches_nothing(self, group: TrajectoryGroup) -> bool:
        """Whether the policy loss learns nothing from the group, be it trained or filtered."""
        return not self._has_samples(group) or self._is_constant(group)

    def _has_samples(self, group: TrajectoryGroup) -> bool:
        return any(is_trained(one, mask_truncated=self._mask_truncated) for one in group.trajectories)

    def _is_constant(self, group: TrajectoryGroup) -> bool:
        """Whether nothing differs within the group: its advantages, or its rewards where those need the step."""
        advantage, rewards_G = self._config.advantage, self.rewards(group)
        return is_constant(advantages(advantage, [group], [rewards_G])[0] if is_groupwise(advantage) else rewards_G)

    def make(self, groups: Sequence[TrajectoryGroup]) -> Batch:
        """Return advantages and samples; `groups` are those of a whole step unless the step is streamed."""
        config = self._config
        computed = advantages(config.advantage, groups, [self.rewards(group) for group in groups])
        samples = batch_samples(
            groups,
            computed,
            aggregation=config.aggregation,
            num_trajectories=config.groups_per_step * config.group_size,
            max_new_tokens=self._max_new_tokens,
            mask_truncated=self._mask_truncated,
        )
        return Batch(groups, computed, samples)


def pass_rate(group: TrajectoryGroup) -> float | None:
    """Return how often the group's problem was solved, in [0, 1]; None where no trajectory can be used.

    The mean of the part `answer`; without such a part, of the reward cut to [0, 1].
    """
    solved = [
        trajectory.score.parts[ANSWER].value if ANSWER in trajectory.score.parts else trajectory.score.reward
        for trajectory in group.trajectories
        if is_usable(trajectory)
    ]
    return float(np.clip(np.mean(solved), 0.0, 1.0)) if solved else None
