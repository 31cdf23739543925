"""Advantages: how much better each trajectory of a group is than its group.

Taken from the rewards of a step's groups, before they become samples. A reward of NaN marks a trajectory that could not
be scored: it takes no part in any statistic, and its advantage is NaN, so that nothing can train on it unnoticed
(`rlsys.data.samples` leaves it out).

Invariant: the advantages of the valid trajectories of a group sum to 0, and adding a constant to all rewards changes
nothing (but in `length_controlled`, where a reward above 0 is a success).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

from rlsys.config_grpo import (
    Advantage,
    GroupMeanAdvantage,
    GroupNormalizedAdvantage,
    LengthControlledAdvantage,
    PassAtKAdvantage,
    ReinforcePlusPlusAdvantage,
    RlooAdvantage,
)
from rlsys.types import TrajectoryGroup

Rewards = NDArray[np.float64]
"""Rewards_G or advantages_G of one group, NaN where a trajectory does not count."""


def advantages(config: Advantage, groups: Sequence[TrajectoryGroup], rewards: Sequence[Rewards]) -> list[Rewards]:
    """Return the advantages_G of each group; `rewards` are the rewards_G of each, in the same order.

    The groups are those of a whole step, or any part of it where `is_groupwise`.
    """
    match config:
        case GroupMeanAdvantage():
            return [group_mean(rewards_G) for rewards_G in rewards]
        case GroupNormalizedAdvantage():
            return [group_normalized(rewards_G) for rewards_G in rewards]
        case RlooAdvantage():
            return [rloo(rewards_G) for rewards_G in rewards]
        case ReinforcePlusPlusAdvantage():
            return reinforce_plus_plus(rewards)
        case LengthControlledAdvantage(alpha=alpha):
            return [
                length_controlled(rewards_G, lengths_of(group), alpha)
                for group, rewards_G in zip(groups, rewards, strict=True)
            ]
        case PassAtKAdvantage(k=k):
            return [pass_at_k(rewards_G, k) for rewards_G in rewards]


def is_groupwise(config: Advantage) -> bool:
    """Whether a group's advantages depend on that group alone, and so are known before the step is complete."""
    return not isinstance(config, ReinforcePlusPlusAdvantage)


def rewards_of(group: TrajectoryGroup) -> Rewards:
    """Return rewards_G in the order of the group's trajectories; NaN where a score is not valid."""
    return np.array(
        [trajectory.score.reward if trajectory.score.is_valid else np.nan for trajectory in group.trajectories],
        dtype=np.float64,
    )


def lengths_of(group: TrajectoryGroup) -> NDArray[np.float64]:
    """Return the tokens of each completion, in the order of the group's trajectories."""
    return np.array([len(trajectory.completion.token_ids_T) for trajectory in group.trajectories], dtype=np.float64)


def is_constant(rewards_G: Rewards) -> bool:
    """Whether the group has nothing to teach: fewer than two valid rewards, or all of them equal.

    Also of advantages: where `length_controlled` tells equal rewards apart, the advantages are not constant.
    """
    valid = rewards_G[~np.isnan(rewards_G)]
    return len(valid) == 0 or bool(valid.max() == valid.min())


def group_mean(rewards_G: Rewards) -> Rewards:
    """Return the group-mean advantage of each trajectory.

    Aᵢ = rᵢ - mean(r), the mean over the valid rewards of the group.

    See *Understanding R1-Zero-Like Training: A Critical Perspective* (Liu et al., 2025, arXiv 2503.20783), "Dr. GRPO":
    without the division by the standard deviation, which weighs problems that are nearly always or nearly never solved
    more than others. The length normaliser that the paper removes too is the matter of the aggregation.
    """
    return _of_valid(rewards_G, lambda valid: valid - valid.mean())


def group_normalized(rewards_G: Rewards, epsilon: float = 1e-6) -> Rewards:
    """Return the group-mean advantage of each trajectory in units of the group's standard deviation.

    Aᵢ = (rᵢ - mean(r)) / (std(r) + ε), statistics over the valid rewards of the group, population standard deviation.

    See *DeepSeekMath* (Shao et al., 2024, arXiv 2402.03300), section 4.1.2, "GRPO"; ε keeps a group of equal rewards
    at 0.
    """
    return _of_valid(rewards_G, lambda valid: (valid - valid.mean()) / (valid.std() + epsilon))


def rloo(rewards_G: Rewards) -> Rewards:
    """Return the leave-one-out advantage of each trajectory.

    Aᵢ = rᵢ - mean of the other valid rewards = n/(n - 1)·(rᵢ - mean(r)); 0 for the only one.

    See *Back to Basics: Revisiting REINFORCE Style Optimization* (Ahmadian et al., 2024, arXiv 2402.14740). Its
    baseline does not contain rᵢ, so the gradient is unbiased; that of `group_mean` is (n - 1)/n as long.
    """
    return _of_valid(rewards_G, lambda valid: (valid - valid.mean()) * (len(valid) / max(len(valid) - 1, 1)))


def reinforce_plus_plus(rewards: Sequence[Rewards], epsilon: float = 1e-6) -> list[Rewards]:
    """Return the group-mean advantages of a whole step in units of their standard deviation over the step.

    Aᵢ = (rᵢ - mean of its group) / (std + ε), the population standard deviation of all valid numerators of the step.

    See *REINFORCE++* (Hu et al., 2025, arXiv 2501.03262), the variant with baseline: unlike GRPO, no group's own
    deviation is in its denominator. The mean of the numerators, which the paper takes off too, is 0.
    """
    centered = [group_mean(rewards_G) for rewards_G in rewards]
    valid = np.concatenate([values[~np.isnan(values)] for values in centered]) if centered else np.zeros(0)
    scale = (float(valid.std()) if len(valid) else 0.0) + epsilon
    return [values / scale for values in centered]


def length_controlled(rewards_G: Rewards, lengths_G: NDArray[np.float64], alpha: float) -> Rewards:
    """Return the leave-one-out advantage of rewards that are lower for longer successes.

    r'ᵢ = rᵢ·(1 - alpha·sigmoid((lenᵢ - mean(len)) / std(len))) where rᵢ > 0, rᵢ elsewhere; then `rloo` of r'. The
    statistics of the lengths are over the group's successes (rᵢ > 0); equal lengths all have sigmoid(0) = 1/2.

    See *Training Language Models to Reason Efficiently* (Arora and Zanette, 2025, arXiv 2502.04463); the rewards
    there are 0 or 1.
    """
    success = rewards_G > 0  # False for NaN
    if not success.any():
        return rloo(rewards_G)
    lengths = lengths_G[success]
    deviation = lengths.std()
    standardised = (lengths - lengths.mean()) / deviation if deviation > 0 else np.zeros_like(lengths)
    lowered = rewards_G.copy()
    lowered[success] *= 1.0 - alpha / (1.0 + np.exp(-standardised))
    return rloo(lowered)


def pass_at_k(rewards_G: Rewards, k: int) -> Rewards:
    """Return the weights of an unbiased gradient of max@k, the expected best reward of k completions.

    Aᵢ = n·(ρ - ρ₋ᵢ), ρ the mean over all subsets of k of the n valid rewards of their maximum, ρ₋ᵢ the same without i.

    The mean over the group of Aᵢ·∇log π(oᵢ) is the gradient of max@k in expectation. For rewards 0 and 1, c of them 1,
    max@k is pass@k and ρ = 1 - C(n - c, k)/C(n, k). For k = 1 it is `rloo`. Where fewer than k + 1 rewards are valid, k
    is one less than their number.

    See *Pass@K Policy Optimization: Solving Harder Reinforcement Learning Problems* (Walder and Karkhanis, 2025, arXiv
    2505.15201). With sᵢ there, Aᵢ = n·(sᵢ - (k/n)·ρ₋ᵢ): the weight with the leave-one-out baseline,
    scaled so that a constant added to the rewards cancels.
    """
    return _of_valid(rewards_G, lambda valid: _max_at_k_weights(valid, min(k, len(valid) - 1)))


def _max_at_k_weights(rewards: Rewards, k: int) -> Rewards:
    n = len(rewards)
    if k < 1:
        return np.zeros_like(rewards)
    order = np.argsort(rewards, kind="stable")
    ascending = rewards[order]
    without = np.array([_max_at_k(np.delete(ascending, place), k) for place in range(n)])
    weights = np.empty_like(rewards)
    weights[order] = n * (_max_at_k(ascending, k) - without)
    return weights


def _max_at_k(ascending: Rewards, k: int) -> float:
    """Return the mean over all subsets of k of the maximum: the j-th smallest (from 0) is it in C(j, k - 1) of them."""
    n = len(ascending)
    counts = np.array([comb(place, k - 1) / comb(n, k) for place in range(n)])
    return float(counts @ ascending)


def _of_valid(rewards_G: Rewards, function: Callable[[Rewards], Rewards]) -> Rewards:
    """Apply `function` to the valid rewards and leave the others NaN."""
    valid = ~np.isnan(rewards_G)
    result = rewards_G.copy()
    if valid.any():
        result[valid] = function(rewards_G[valid])
    return result
