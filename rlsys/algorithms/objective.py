"""The objective of a run: the configured loss, correction and regularisers as one function of a micro-batch's tokens.

Made once from the configuration, sent to every learner rank, called for each micro-batch. It is the one place that
looks at the `kind` of these sections.

    policy loss(ratio to μ)                       without a correction, or with one that only masks
    correction(π_prox/μ) · policy loss(π/π_prox)  with a correction that weighs
    + kl.weight · KL - entropy_weight · entropy   where configured; the correction does not touch them

Invariant: the step from μ to π enters each token's policy loss once. A correction that weighs supplies π_prox/μ, so the
loss is then given π_prox in the place of μ; with one optimizer step per batch its own ratio is 1, and `ppo_clip` with
`tis` is REINFORCE with truncated importance weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from rlsys.algorithms import corrections, losses
from rlsys.algorithms.combinations import WEIGHTS, incompatible
from rlsys.algorithms.regularisers import entropy_bonus, kl
from rlsys.algorithms.second_moment import m2po, outward_log_ratios, second_moment_threshold
from rlsys.algorithms.sequence_losses import gspo
from rlsys.algorithms.tokens import PolicyTokens, TokenLoss
from rlsys.config_grpo import (
    CispoLoss,
    Correction,
    DecoupledPpoLoss,
    DppoLoss,
    GrpoConfig,
    GspoLoss,
    IcePopCorrection,
    KlConfig,
    Loss,
    M2poLoss,
    PpoClipLoss,
    ReinforceLoss,
    SapoLoss,
    SequenceMaskCorrection,
    TruncatedCorrection,
)


@dataclass(frozen=True)
class PolicyObjective:
    """What is minimised, per token. Crosses process borders by pickle."""

    loss: Loss
    correction: Correction | None = None
    kl: KlConfig | None = None
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.correction is not None:
            reason = incompatible(self.loss.kind, self.correction.kind)
            assert reason is None, f"{self.correction.kind} with {self.loss.kind}: {reason}"

    @classmethod
    def from_config(cls, grpo: GrpoConfig) -> PolicyObjective:
        """Return the objective that the configuration describes."""
        return cls(grpo.loss, grpo.correction, grpo.kl, grpo.entropy_weight)

    @property
    def needs_reference(self) -> bool:
        """Whether `reference_logprobs` are read."""
        return self.kl is not None

    @property
    def needs_entropies(self) -> bool:
        """Whether `entropies` are read; they must carry their gradient then."""
        return self.entropy_weight > 0

    @property
    def needs_step_threshold(self) -> bool:
        """Whether `threshold` is read: a first pass without gradient over the whole step must find it."""
        return isinstance(self.loss, M2poLoss)

    def step_log_ratios(self, tokens: PolicyTokens) -> Tensor:
        """Return what the first pass keeps of a micro-batch: a flat float64 tensor, to be joined over the step."""
        return outward_log_ratios(_without_masked(tokens, self._weights(tokens)))

    def step_threshold(self, log_ratios_N: Tensor) -> float:
        """Return the `threshold` from the joined `step_log_ratios` of all micro-batches and ranks, in any order."""
        assert isinstance(self.loss, M2poLoss), f"{self.loss.kind} has no threshold"
        return second_moment_threshold(log_ratios_N, self.loss.tau)

    def __call__(
        self,
        tokens: PolicyTokens,
        *,
        reference_logprobs: Tensor | None = None,
        entropies: Tensor | None = None,
        threshold: float | None = None,
    ) -> TokenLoss:
        """Return the loss of each token; the optional arguments have the shape of the tokens.

        Diagnostics, beside those of the loss: `weight` and `masked` (the correction's weight; 1.0 where it is 0), `kl`
        (the estimate, without its weight) and `entropy` (where entropies are given).
        """
        weights = self._weights(tokens)
        loss, diagnostics = self._policy_loss(self._anchored(tokens), threshold)
        if weights is not None:
            loss = weights * loss
            masked = tokens.active & (weights == 0)
            diagnostics = diagnostics | {"weight": weights, "masked": masked.to(loss.dtype)}
        if self.kl is not None:
            assert reference_logprobs is not None, "the KL penalty needs reference_logprobs"
            divergence = kl(tokens.logprobs, reference_logprobs, tokens.mask, self.kl.estimator)
            loss = loss + self.kl.weight * divergence
            diagnostics = diagnostics | {"kl": divergence.detach()}
        if entropies is not None:
            loss = loss + entropy_bonus(entropies, tokens.mask, self.entropy_weight)
            diagnostics = diagnostics | {"entropy": -entropy_bonus(entropies.detach(), tokens.mask, 1.0)}
        assert entropies is not None or not self.needs_entropies, "the entropy bonus needs entropies"
        return TokenLoss(loss, diagnostics)

    def _weights(self, tokens: PolicyTokens) -> Tensor | None:
        match self.correction:
            case None:
                return None
            case TruncatedCorrection(cap=cap, level=level):
                return corrections.tis(tokens, cap=cap, level=level)
            case IcePopCorrection(low=low, high=high):
                return corrections.icepop(tokens, low=low, high=high)
            case SequenceMaskCorrection(low=low, high=high):
                return corrections.sequence_mask(tokens, low=low, high=high)

    def _anchored(self, tokens: PolicyTokens) -> PolicyTokens:
        """Return the tokens as the loss sees them: π_prox stands for μ where the correction supplies π_prox/μ."""
        if self.correction is None or self.correction.kind not in WEIGHTS:
            return tokens
        return replace(tokens, behavior_logprobs=tokens.proximal)

    def _policy_loss(self, tokens: PolicyTokens, threshold: float | None) -> TokenLoss:
        match self.loss:
            case DppoLoss(delta=delta, tau=tau):
                return losses.dppo_tv(tokens, delta=delta, tau=tau)
            case ReinforceLoss():
                return losses.reinforce(tokens)
            case PpoClipLoss(epsilon_low=low, epsilon_high=high, dual_clip=dual_clip):
                return losses.ppo_clip(tokens, epsilon_low=low, epsilon_high=high, dual_clip=dual_clip)
            case DecoupledPpoLoss(epsilon_low=low, epsilon_high=high, weight_cap=cap):
                return losses.decoupled_ppo(tokens, epsilon_low=low, epsilon_high=high, weight_cap=cap)
            case GspoLoss(epsilon_low=low, epsilon_high=high):
                return gspo(tokens, epsilon_low=low, epsilon_high=high)
            case CispoLoss(epsilon_low=low, epsilon_high=high):
                return losses.cispo(tokens, epsilon_low=low, epsilon_high=high)
            case SapoLoss(tau_positive=positive, tau_negative=negative):
                return losses.sapo(tokens, tau_positive=positive, tau_negative=negative)
            case M2poLoss():
                assert threshold is not None, "m2po needs the threshold of the step"
                return m2po(tokens, threshold=threshold)


def _without_masked(tokens: PolicyTokens, weights: Tensor | None) -> PolicyTokens:
    return tokens if weights is None else replace(tokens, mask=tokens.mask * (weights > 0))
