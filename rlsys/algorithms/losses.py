"""Policy losses: from the log-probability of each token to its loss.

Called by each learner rank for each micro-batch. All arguments have one common shape (packed rows BT, or anything
else): the loss of a token depends on that token alone, so it knows nothing of sequences, rows or ranks. The caller sums
it and divides by the number of loss tokens of the whole step over all ranks; the result then does not depend on
packing, micro-batching or the number of ranks.

Notation, per token: π probability under the policy that is trained (`logprobs` = log π); μ probability under the policy
that sampled it (`behavior_logprobs` = log μ); ρ = π/μ; A advantage; natural logarithms. The ratio is taken to the
sampling policy, which corrects staleness and the numerical differences between engine and learner in one.

Invariant: where ρ = 1, the gradient of each loss is the gradient of `-A·log π` (REINFORCE). Where the mask is 0, loss,
gradient and diagnostics are 0, whatever the other arguments hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""|log ρ| at which the ratio stops growing: e^20 still multiplies and adds safely in float32, e^89 is infinite."""


class TokenLoss(NamedTuple):
    """The loss of each token and what else is known about it; all in the shape of the arguments."""

    loss: Tensor
    diagnostics: dict[str, Tensor]
    """Detached. `clipped` is always there: 1.0 where the trust region stops the token's policy gradient."""


def reinforce(logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
    """Return the policy-gradient loss without importance correction, `-A·log π`.

    See *Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning* (Williams, 1992).
    Right only for tokens of the current policy (staleness 0); `behavior_logprobs` is not read.
    """
    _assert_one_shape(logprobs, behavior_logprobs, advantages, mask)
    active = mask > 0
    loss = _keep(active, -advantages * _keep(active, logprobs))
    return TokenLoss(loss, {"clipped": torch.zeros_like(loss)})


def ppo_clip(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> TokenLoss:
    """Return the clipped surrogate loss.

    -min(ρA, clip(ρ, 1 - ε_low, 1 + ε_high)·A)

    See *Proximal Policy Optimization Algorithms* (Schulman et al., 2017, arXiv 1707.06347), eq. 7; two bounds as in
    *DAPO* (Yu et al., 2025, arXiv 2503.14476), section 3.1. Here ρ is taken to the sampling policy.
    """
    _assert_one_shape(logprobs, behavior_logprobs, advantages, mask)
    active = mask > 0
    ratio = _ratio(_keep(active, logprobs - behavior_logprobs))
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = _keep(active, -torch.minimum(ratio * advantages, clipped_ratio * advantages))
    stopped = active & (clipped_ratio * advantages < ratio * advantages)
    return TokenLoss(loss, {"clipped": stopped.to(loss.dtype)})


def dppo_tv(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    delta: float = 0.2,
    tau: float = 1e-3,
) -> TokenLoss:
    """Return the DPPO loss with the binary total-variation mask, and a quadratic pull towards the sampling policy.

    -M·ρ·A + τ·(log ρ)²,  M = 0 where A > 0 and π - μ > δ, or A < 0 and π - μ < -δ; 1 elsewhere

    |π - μ| is the total variation between the two policies reduced to "this token or another". M stops a token only
    while its gradient leads further out of the trust region.

    See *Rethinking the Trust Region in LLM Reinforcement Learning* (Qi et al., 2026, arXiv 2602.04879), eqs. 11-13, for
    the first term; *Kimi K2.5* (2026, arXiv 2602.02276) for the second, which M does not touch: it leads stopped tokens
    back. prime-rl's default loss joins the two, with these defaults.
    """
    _assert_one_shape(logprobs, behavior_logprobs, advantages, mask)
    active = mask > 0
    log_ratio = _keep(active, logprobs - behavior_logprobs)
    shift = _keep(active, logprobs.detach().exp() - behavior_logprobs.exp())
    stopped = active & (((advantages > 0) & (shift > delta)) | ((advantages < 0) & (shift < -delta)))
    policy_loss = _keep(active & ~stopped, -_ratio(log_ratio) * advantages)
    penalty = tau * log_ratio.square()
    return TokenLoss(
        policy_loss + penalty,
        {"clipped": stopped.to(penalty.dtype), "kl_penalty": penalty.detach()},
    )


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _keep(condition: Tensor, values: Tensor) -> Tensor:
    """Return `values` where `condition` holds and 0 elsewhere; unlike a product, also 0 where values are not finite.

    Applied to the arguments of exp and not only to its result: the gradient of a masked infinity is NaN otherwise.
    """
    return torch.where(condition, values, torch.zeros_like(values))


def _assert_one_shape(*tensors: Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    assert len(shapes) == 1, f"the arguments of a loss have one shape, got {sorted(shapes)}"
