"""Advantages: how much better each trajectory of a group is than its group.

Taken from the rewards of one group, before the group becomes samples. A reward of NaN marks a trajectory that could not
be scored: it takes no part in the group's statistics, and its advantage is NaN, so that nothing can train on it
unnoticed (`rlsys.data.samples` leaves it out).

Invariant: the advantages of the valid trajectories of a group sum to 0, and adding a constant to all rewards changes
nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rlsys.types import TrajectoryGroup


def rewards_of(group: TrajectoryGroup) -> NDArray[np.float64]:
    """Return rewards_G in the order of the group's trajectories; NaN where a score is not valid."""
    return np.array(
        [trajectory.score.reward if trajectory.score.is_valid else np.nan for trajectory in group.trajectories],
        dtype=np.float64,
    )


def is_constant(rewards_G: NDArray[np.float64]) -> bool:
    """Whether the group has nothing to teach: fewer than two valid rewards, or all of them equal."""
    valid = rewards_G[~np.isnan(rewards_G)]
    return len(valid) == 0 or bool(valid.max() == valid.min())


def group_mean(rewards_G: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the group-mean advantage of each trajectory.

    Aᵢ = rᵢ - mean(r), the mean over the valid rewards of the group.

    See *Understanding R1-Zero-Like Training: A Critical Perspective* (Liu et al., 2025, arXiv 2503.20783), "Dr. GRPO":
    without the division by the standard deviation, which weighs problems that are nearly always or nearly never solved
    more than others. The length normaliser that the paper removes too is the matter of the loss.
    """
    valid = ~np.isnan(rewards_G)
    if not valid.any():
        return rewards_G.copy()
    return rewards_G - rewards_G[valid].mean()


def group_normalized(rewards_G: NDArray[np.float64], epsilon: float = 1e-6) -> NDArray[np.float64]:
    """Return the group-mean advantage of each trajectory in units of the group's standard deviation.

    Aᵢ = (rᵢ - mean(r)) / (std(r) + ε), statistics over the valid rewards of the group, population standard deviation.

    See *DeepSeekMath* (Shao et al., 2024, arXiv 2402.03300), section 4.1.2, "GRPO"; ε keeps a group of equal rewards
    at 0.
    """
    valid = ~np.isnan(rewards_G)
    if not valid.any():
        return rewards_G.copy()
    return group_mean(rewards_G) / (rewards_G[valid].std() + epsilon)
