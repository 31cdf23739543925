"""How far the policy that is trained is from the policy that sampled: sums over tokens, ready to be added.

Made by each learner rank for each micro-batch beside the loss; the sums of all micro-batches and ranks are added, and
only then divided. Two sets of tokens are told apart. Over *all* tokens the numbers show staleness and numerical
differences together. Over tokens whose version equals the learner's, the two policies have the same weights, so the
numbers show the mismatch between the inference engine and the learner alone: it must stay near 0, however stale the
rest is.

Invariant: `a + b` of two disjoint sets of tokens is what their union gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.losses import MAX_LOG_RATIO


@dataclass(frozen=True)
class RatioSums:
    """Sums over tokens of functions of the ratio ρ = π/μ. For no tokens, `ess` and `ratio_mean` are 1, the rest 0."""

    tokens: float = 0.0
    ratio_sum: float = 0.0
    ratio_square_sum: float = 0.0
    k3_sum: float = 0.0
    abs_diff_sum: float = 0.0
    abs_diff_max: float = 0.0
    """The greatest |log π - log μ|."""
    clipped_sum: float = 0.0

    @classmethod
    def zero(cls) -> RatioSums:
        """Return the sums over no tokens, where an addition starts."""
        return cls()

    def __add__(self, other: RatioSums) -> RatioSums:
        """Return the sums over both sets of tokens."""
        return RatioSums(
            tokens=self.tokens + other.tokens,
            ratio_sum=self.ratio_sum + other.ratio_sum,
            ratio_square_sum=self.ratio_square_sum + other.ratio_square_sum,
            k3_sum=self.k3_sum + other.k3_sum,
            abs_diff_sum=self.abs_diff_sum + other.abs_diff_sum,
            abs_diff_max=max(self.abs_diff_max, other.abs_diff_max),
            clipped_sum=self.clipped_sum + other.clipped_sum,
        )

    @property
    def kl_k3(self) -> float:
        """Estimate of KL(μ ‖ π) in nats: the mean of ρ - 1 - log ρ over tokens sampled from μ.

        Unbiased and never negative. See *Approximating KL Divergence* (Schulman, 2020), estimator k3.
        """
        return self._mean(self.k3_sum)

    @property
    def abs_diff_mean(self) -> float:
        """Mean |log π - log μ|."""
        return self._mean(self.abs_diff_sum)

    @property
    def ratio_mean(self) -> float:
        """Mean ρ: 1 in expectation, since the tokens are sampled from μ."""
        return self.ratio_sum / self.tokens if self.tokens else 1.0

    @property
    def ess(self) -> float:
        """Effective sample size as a fraction of the tokens, (Σρ)² / (n·Σρ²): 1 where all ratios are equal."""
        return self.ratio_sum**2 / (self.tokens * self.ratio_square_sum) if self.tokens else 1.0

    @property
    def clipped_fraction(self) -> float:
        """Part of the tokens whose policy gradient the trust region stops."""
        return self._mean(self.clipped_sum)

    def _mean(self, total: float) -> float:
        return total / self.tokens if self.tokens else 0.0


def ratio_sums(logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor, clipped: Tensor | None = None) -> RatioSums:
    """Return the sums over the tokens where `mask` is not 0; all arguments have one common shape.

    `clipped` is the diagnostic of that name of a loss. Computed in float64, in which the tokens of a step add exactly
    enough that the order of micro-batches and ranks does not show.
    """
    active = mask > 0
    if not bool(active.any()):
        return RatioSums()
    log_ratio = (logprobs.detach()[active].double() - behavior_logprobs[active].double()).clamp(
        -MAX_LOG_RATIO, MAX_LOG_RATIO
    )
    ratio = log_ratio.exp()
    sums: list[float] = torch.stack([
        ratio.sum(),
        ratio.square().sum(),
        # expm1 keeps the digits that ρ - 1 loses where ρ is near 1, which is where the mismatch lives.
        (torch.expm1(log_ratio) - log_ratio).sum(),
        log_ratio.abs().sum(),
        log_ratio.abs().max(),
        torch.zeros_like(ratio[0]) if clipped is None else clipped[active].double().sum(),
    ]).tolist()  # fmt: skip
    return RatioSums(float(log_ratio.numel()), *sums)


def same_version_mask(mask: Tensor, versions: Tensor, learner_version: int) -> Tensor:
    """Return `mask` for the tokens that `learner_version` itself sampled, and 0 for all others."""
    return torch.where(versions == learner_version, mask, torch.zeros_like(mask))


def ratio_metrics(all_tokens: RatioSums, same_version: RatioSums) -> dict[str, float]:
    """Return the values under their names in `rlsys.metrics`; what has no tokens to be measured on is left out."""
    values: dict[str, float] = {}
    if all_tokens.tokens:
        values |= {
            "train/ratio_mean": all_tokens.ratio_mean,
            "train/ratio_clipped_fraction": all_tokens.clipped_fraction,
            "train/ess_fraction": all_tokens.ess,
            "train/behavior_kl": all_tokens.kl_k3,
            "train/logprob_abs_mean": all_tokens.abs_diff_mean,
            "train/logprob_abs_max": all_tokens.abs_diff_max,
            "train/mismatch_tokens": same_version.tokens,
        }
    if same_version.tokens:
        values |= {
            "train/mismatch_kl": same_version.kl_k3,
            "train/mismatch_abs_mean": same_version.abs_diff_mean,
            "train/mismatch_abs_max": same_version.abs_diff_max,
        }
    return values
