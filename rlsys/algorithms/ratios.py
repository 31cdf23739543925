"""How far the policy that is trained is from the policy that sampled: sums over tokens, ready to be added.

Made by each learner rank for each micro-batch beside the loss; the sums of all micro-batches and ranks are added, and
only then divided. Tokens are told apart by their staleness, the learner's version minus that of the token. At staleness
0 the two policies have the same weights, so the numbers show the mismatch between the inference engine and the learner
alone: it must stay near 0, however stale the rest is. Over all tokens, mismatch and staleness show together.

Invariant: `a + b` of two disjoint sets of tokens is what their union gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algorithms.tokens import MAX_LOG_RATIO, keep
from rlsys.metrics import MAX_STALENESS


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
    masked_sum: float = 0.0

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
            masked_sum=self.masked_sum + other.masked_sum,
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
        """Part of the tokens at which the loss's bound acts: it stops their policy gradient, or clips their weight."""
        return self._mean(self.clipped_sum)

    @property
    def masked_fraction(self) -> float:
        """Part of the tokens that the correction leaves out of the policy loss."""
        return self._mean(self.masked_sum)

    def _mean(self, total: float) -> float:
        return total / self.tokens if self.tokens else 0.0


SumsByStaleness = Mapping[int, RatioSums]
"""Sums over the tokens of each staleness that occurs, from 0 to `MAX_STALENESS`."""


def ratio_sums(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    staleness: Tensor,
    *,
    clipped: Tensor | None = None,
    masked: Tensor | None = None,
) -> SumsByStaleness:
    """Return the sums over the tokens where `mask` is not 0, by staleness; all arguments have one common shape.

    `staleness` counts versions and is not negative where the mask is not 0; `clipped` and `masked` are the diagnostics
    of these names (`rlsys.algorithms.tokens`). One pass whatever the number of versions, in float64, in which the
    tokens of a step add exactly enough that the order of micro-batches and ranks does not show.
    """
    active = mask > 0
    bins = keep(active, staleness).clamp(max=MAX_STALENESS).flatten().long()
    assert bins.numel() == 0 or int(bins.min()) >= 0, "a token is of a version that the learner does not have yet"
    log_ratio = keep(active, logprobs.detach() - behavior_logprobs).flatten().double()
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    counts = active.flatten().double()
    ratio = log_ratio.exp() * counts
    distance = log_ratio.abs()
    zeros = torch.zeros_like(counts)
    added = torch.stack([
        counts,
        ratio,
        ratio.square(),
        # expm1 keeps the digits that ρ - 1 loses where ρ is near 1, which is where the mismatch lives.
        torch.expm1(log_ratio) - log_ratio,
        distance,
        zeros if clipped is None else keep(active, clipped).flatten().double(),
        zeros if masked is None else keep(active, masked).flatten().double(),
    ], dim=1)  # fmt: skip
    sums = added.new_zeros(MAX_STALENESS + 1, added.shape[1]).index_add(0, bins, added)
    greatest = added.new_zeros(MAX_STALENESS + 1).scatter_reduce(0, bins, distance, "amax")
    rows: list[list[float]] = torch.cat([sums, greatest[:, None]], dim=1).tolist()
    return {
        stale: RatioSums(tokens, ratio_sum, square_sum, k3_sum, distance_sum, distance_max, clipped_sum, masked_sum)
        for stale, (
            tokens, ratio_sum, square_sum, k3_sum, distance_sum, clipped_sum, masked_sum, distance_max,
        ) in enumerate(rows)
        if tokens
    }  # fmt: skip


def add_sums(parts: Iterable[SumsByStaleness]) -> SumsByStaleness:
    """Return the sums over all micro-batches and ranks, by staleness in ascending order."""
    total: dict[int, RatioSums] = {}
    for part in parts:
        for stale, sums in part.items():
            total[stale] = total.get(stale, RatioSums.zero()) + sums
    return dict(sorted(total.items()))


def ratio_metrics(by_staleness: SumsByStaleness, probed: RatioSums | None = None) -> dict[str, float]:
    """Return the values under their names in `rlsys.metrics`; what has no tokens to be measured on is left out.

    `probed` are sums over tokens of staleness 0 that are not in the loss: the mismatch counts them, nothing else does.
    """
    all_tokens = sum(by_staleness.values(), RatioSums.zero())
    same_version = by_staleness.get(0, RatioSums.zero()) + (probed or RatioSums.zero())
    values: dict[str, float] = {}
    if all_tokens.tokens:
        values |= {
            "train/ratio_mean": all_tokens.ratio_mean,
            "train/ratio_clipped_fraction": all_tokens.clipped_fraction,
            "train/ratio_masked_fraction": all_tokens.masked_fraction,
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
    for stale, sums in by_staleness.items():
        values |= {
            f"off_policy/logprob_abs_mean_staleness_{stale}": sums.abs_diff_mean,
            f"off_policy/logprob_abs_max_staleness_{stale}": sums.abs_diff_max,
            f"off_policy/kl_staleness_{stale}": sums.kl_k3,
            f"off_policy/ratio_mean_staleness_{stale}": sums.ratio_mean,
            f"off_policy/ess_staleness_{stale}": sums.ess,
            f"off_policy/clipped_fraction_staleness_{stale}": sums.clipped_fraction,
            f"off_policy/masked_fraction_staleness_{stale}": sums.masked_fraction,
        }
    return values
