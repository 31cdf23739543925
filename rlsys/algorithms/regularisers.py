"""Terms beside the policy loss: a penalty for leaving the reference policy, and a bonus for entropy.

Called by the objective for each micro-batch; per token, in the shape of the arguments, added to the policy loss with
their weights.

Invariant: where the mask is 0, value and gradient are 0, whatever the other arguments hold.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlsys.algorithms.tokens import MAX_LOG_RATIO, keep

Estimator = Literal["k1", "k2", "k3"]


def kl(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, estimator: Estimator) -> Tensor:
    """Return a one-sample estimate of KL(π ‖ π_ref) for each token, nats, whose gradient is what the loss descends.

    With x = log π - log π_ref (held within ±20):

        k1   x               unbiased, of either sign       gradient x·∇log π
        k2   x²/2            biased, small near x = 0       gradient x·∇log π
        k3   exp(-x) - 1 + x unbiased, never negative       gradient (1 - exp(-x))·∇log π

    x·∇log π is, in expectation over tokens of π, the gradient of KL(π ‖ π_ref): the right one. That of k3 is the
    gradient of KL(π_ref ‖ π) (its x-part vanishes in expectation), which agrees near π_ref only; it is GRPO's choice.
    The derivative of k1 itself is ∇log π, whose expectation is 0: it would penalise nothing. So k1 carries the gradient
    of k2 here, which is what a penalty inside the reward amounts to. All of it holds for tokens of π; for stale ones
    the expectation is over μ.

    See *Approximating KL Divergence* (Schulman, 2020) for the values; *On a few pitfalls in KL divergence gradient
    estimation for RL* (Tang and Munos, 2025, arXiv 2506.09477) and *Rethinking KL Regularization in RLHF* (Liu et al.,
    2025, arXiv 2510.01555) for the gradients.
    """
    active = mask > 0
    logprobs = keep(active, logprobs)
    log_ratio = (logprobs - keep(active, reference_logprobs)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match estimator:
        case "k1":
            return log_ratio.detach() * (1.0 + logprobs - logprobs.detach())
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            # expm1 keeps the digits that exp(-x) - 1 loses near x = 0.
            return torch.expm1(-log_ratio) + log_ratio


def entropy_bonus(entropies: Tensor, mask: Tensor, weight: float) -> Tensor:
    """Return -weight·H for each token, H the entropy of the policy's distribution at its place, nats, with gradient."""
    return -weight * keep(mask > 0, entropies)
