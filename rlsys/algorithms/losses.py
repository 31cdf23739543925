"""Policy losses: from the log-probability of each token to its loss.

Called by the objective for each micro-batch of each learner rank. The loss of a token depends on that token alone (the
losses that look at a whole completion are in `rlsys.algorithms.sequence_losses`, the one that looks at a whole step in
`rlsys.algorithms.second_moment`), so it knows nothing of rows or ranks. The caller multiplies each loss with the weight
of its sample (`rlsys.algorithms.aggregation`) and adds; the result then does not depend on packing, micro-batching or
the number of ranks.

Notation: `rlsys.algorithms.tokens`, and ρ = π/μ. The ratio is taken to the sampling policy, which corrects staleness
and the numerical differences between engine and learner in one; only where a correction supplies π_prox/μ as a weight
does the objective put π_prox in the place of μ.

Invariant: where ρ = 1, the gradient of each loss is the gradient of `-A·log π` (REINFORCE).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.tokens import PolicyTokens, TokenLoss, keep, ratio_of


def reinforce(tokens: PolicyTokens) -> TokenLoss:
    """Return the policy-gradient loss without importance correction, `-A·log π`.

    See *Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning* (Williams, 1992).
    Right only for tokens of the current policy (staleness 0); `behavior_logprobs` is not read.
    """
    tokens = tokens.cleaned()
    loss = -tokens.advantages * tokens.logprobs
    return TokenLoss(loss, {"clipped": torch.zeros_like(loss)})


def ppo_clip(
    tokens: PolicyTokens, *, epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None
) -> TokenLoss:
    """Return the clipped surrogate loss.

    -min(ρA, clip(ρ, 1 - ε_low, 1 + ε_high)·A);  with dual clip c and A < 0: no more than -c·A

    See *Proximal Policy Optimization Algorithms* (Schulman et al., 2017, arXiv 1707.06347), eq. 7; two bounds as in
    *DAPO* (Yu et al., 2025, arXiv 2503.14476), section 3.1; c as in *Mastering Complex Control in MOBA Games with Deep
    Reinforcement Learning* (Ye et al., 2020, arXiv 1912.09729): without it the loss of a token of negative
    advantage grows with ρ without bound. Here ρ is taken to the sampling policy.
    """
    tokens = tokens.cleaned()
    ratio = ratio_of(tokens.logprobs - tokens.behavior_logprobs)
    loss, stopped = clipped_surrogate(ratio, tokens.advantages, epsilon_low, epsilon_high)
    if dual_clip is not None:
        bound = -dual_clip * tokens.advantages
        capped = (tokens.advantages < 0) & (loss > bound)
        loss = torch.where(capped, bound, loss)
        stopped = stopped | capped
    return TokenLoss(loss, {"clipped": stopped.to(loss.dtype)})


def decoupled_ppo(
    tokens: PolicyTokens, *, epsilon_low: float = 0.2, epsilon_high: float = 0.2, weight_cap: float = 5.0
) -> TokenLoss:
    """Return the decoupled PPO loss: the trust region is round the proximal policy, μ enters as a capped weight.

    -sg(min(π_prox/μ, cap))·min(rA, clip(r, 1 - ε_low, 1 + ε_high)·A),  r = π/π_prox

    See *AReaL* (Fu et al., 2025, arXiv 2505.24298), section 5.2, after *Batch Size-Invariance for Policy Optimization*
    (Hilton et al., 2021, arXiv 2110.00641); the cap is not in the formula there, and bounds the variance. Without
    `proximal_logprobs`, r = 1: then no token is clipped, and the gradient is that of REINFORCE with capped weights.
    """
    tokens = tokens.cleaned()
    proximal = tokens.proximal
    weight = ratio_of(proximal - tokens.behavior_logprobs).clamp(max=weight_cap)
    ratio = ratio_of(tokens.logprobs - proximal)
    loss, stopped = clipped_surrogate(ratio, tokens.advantages, epsilon_low, epsilon_high)
    return TokenLoss(weight * loss, {"clipped": stopped.to(loss.dtype), "weight": keep(tokens.active, weight)})


def dppo_tv(tokens: PolicyTokens, *, delta: float = 0.2, tau: float = 1e-3) -> TokenLoss:
    """Return the DPPO loss with the binary total-variation mask, and a quadratic pull towards the sampling policy.

    -M·ρ·A + τ·(log ρ)²,  M = 0 where A > 0 and π - μ > δ, or A < 0 and π - μ < -δ; 1 elsewhere

    |π - μ| is the total variation between the two policies reduced to "this token or another". M stops a token only
    while its gradient leads further out of the trust region.

    See *Rethinking the Trust Region in LLM Reinforcement Learning* (Qi et al., 2026, arXiv 2602.04879), eqs. 11-13, for
    the first term; *Kimi K2.5* (2026, arXiv 2602.02276) for the second, which M does not touch: it leads stopped tokens
    back. prime-rl's default loss joins the two, with these defaults.
    """
    tokens = tokens.cleaned()
    advantages = tokens.advantages
    log_ratio = tokens.logprobs - tokens.behavior_logprobs
    shift = tokens.logprobs.detach().exp() - tokens.behavior_logprobs.exp()
    stopped = ((advantages > 0) & (shift > delta)) | ((advantages < 0) & (shift < -delta))
    policy_loss = keep(~stopped, -ratio_of(log_ratio) * advantages)
    penalty = tau * log_ratio.square()
    return TokenLoss(
        policy_loss + penalty,
        {"clipped": stopped.to(penalty.dtype), "kl_penalty": penalty.detach()},
    )


def cispo(tokens: PolicyTokens, *, epsilon_low: float = 1.0, epsilon_high: float = 2.0) -> TokenLoss:
    """Return the CISPO loss: REINFORCE with a clipped importance weight, so that no token loses its gradient.

    -sg(clip(ρ, 1 - ε_low, 1 + ε_high))·A·log π

    See *MiniMax-M1* (2025, arXiv 2506.13585), eqs. 4 and 5, which has no lower bound (ε_low = 1) and tunes ε_high.
    `clipped` marks the tokens whose weight was clipped.
    """
    tokens = tokens.cleaned()
    ratio = ratio_of(tokens.logprobs.detach() - tokens.behavior_logprobs)
    weight = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    loss = -weight * tokens.advantages * tokens.logprobs
    return TokenLoss(loss, {"clipped": (weight != ratio).to(loss.dtype)})


def sapo(tokens: PolicyTokens, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> TokenLoss:
    """Return the SAPO loss: a smooth gate in place of the clip.

    -(4/τ)·sigmoid(τ(ρ - 1))·A,  τ = τ_positive where A > 0, τ_negative elsewhere

    The gradient is that of -sg(g)·ρ·A with the gate g = 4·p(1 - p), p = sigmoid(τ(ρ - 1)): 1 at ρ = 1 for every τ,
    falling smoothly on both sides. It falls faster for negative advantages, which raise the
    probability of all other tokens.

    See *Soft Adaptive Policy Optimization* (Gao et al., 2025, arXiv 2511.20347), with its default values.
    No token is stopped, so `clipped` is 0; the diagnostic `gate` is g.
    """
    tokens = tokens.cleaned()
    ratio = ratio_of(tokens.logprobs - tokens.behavior_logprobs)
    tau = torch.full_like(ratio, tau_negative).masked_fill(tokens.advantages > 0, tau_positive)
    probability = torch.sigmoid(tau * (ratio - 1.0))
    loss = -4.0 / tau * probability * tokens.advantages
    gate = 4.0 * (probability * (1.0 - probability)).detach()
    return TokenLoss(loss, {"clipped": torch.zeros_like(loss), "gate": keep(tokens.active, gate)})


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """Return PPO's loss, and where its minimum is the clipped term, which has no gradient."""
    gain = ratio * advantages
    clipped_gain = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high) * advantages
    return -torch.minimum(gain, clipped_gain), clipped_gain < gain
