"""Corrections: detached weights for the difference between the policy that sampled and the one that is trained.

Called by the objective, which multiplies the policy loss of each token with its weight. Notation:
`rlsys.algorithms.tokens`, and w = π_prox/μ for a token (π for π_prox where a batch makes one optimizer step): what the
difference between engine and learner and the staleness make together. Which of these functions contain w and which
only mask, and what follows for the loss, is in `rlsys.algorithms.combinations`.

Invariant: a weight is not negative, has no gradient, is 1 where π_prox = μ, and is 0 where the mask is 0.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rlsys.algorithms.tokens import PolicyTokens, keep, ratio_of, sequence_sums


def tis(tokens: PolicyTokens, *, cap: float = 2.0, level: Literal["token", "sequence"] = "token") -> Tensor:
    """Return truncated importance weights, min(w, cap).

    With level `sequence`, w is the product over the completion's tokens that count, the same for each of them: what the
    gradient of a completion's reward asks for, at a variance that grows with its length.

    See *Your Efficient RL Framework Secretly Brings You Off-Policy RL Training* (Yao et al., 2025), which truncates per
    token; *Truncated Importance Sampling* (Ionides, 2008) for the estimator.
    """
    tokens = tokens.cleaned()
    log_weight = _log_weight(tokens)
    if level == "sequence":
        log_weight, _ = sequence_sums(log_weight, tokens)
    return keep(tokens.active, ratio_of(log_weight).clamp(max=cap))


def icepop(tokens: PolicyTokens, *, low: float = 0.5, high: float = 5.0) -> Tensor:
    """Return w where low <= w <= high, and 0 outside: what differs too much is left out instead of truncated.

    See *Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model* (Ling Team, 2025, arXiv
    2510.18855), "IcePop", with its bounds.
    """
    tokens = tokens.cleaned()
    weight = ratio_of(_log_weight(tokens))
    return keep(tokens.active & (weight >= low) & (weight <= high), weight)


def sequence_mask(tokens: PolicyTokens, *, low: float = 0.99, high: float = 1.01) -> Tensor:
    """Return 1 for the tokens of completions whose geometric mean of w lies in [low, high], and 0 for the others.

    The geometric mean exp(mean over the tokens that count of log w) does not depend on the length, as the product does.

    See *When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch* (Liu et al., 2025).
    """
    tokens = tokens.cleaned()
    sums, counts = sequence_sums(_log_weight(tokens), tokens)
    mean_weight = ratio_of(sums / counts)
    inside = tokens.active & (mean_weight >= low) & (mean_weight <= high)
    return inside.to(tokens.logprobs.dtype)


def _log_weight(tokens: PolicyTokens) -> Tensor:
    return tokens.proximal - tokens.behavior_logprobs
