"""M2PO: the policy loss whose trust region is a property of the whole step.

Two passes. Before the update, the learner runs its micro-batches without gradient, collects `outward_log_ratios` of
each, gathers those of all ranks, and takes `second_moment_threshold` of all together; then `m2po` reads the number. The
threshold looks at the sorted values only, so it depends on neither micro-batches, ranks nor their order, and it lies
between two values that occur, so that a rounding difference between the passes moves no token across it.

Notation: `rlsys.algorithms.tokens`, and ρ = π/μ. *Outward* is a token whose gradient would lead π further away from μ:
A > 0 and ρ > 1, or A < 0 and ρ < 1. These are the tokens that PPO can clip, and the only ones that count here.

Invariant: the outward tokens that `m2po` keeps have a mean squared log-ratio of at most τ, and every outward token that
is masked has a greater |log ρ| than all that are kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlsys.algorithms.tokens import PolicyTokens, TokenLoss, keep, ratio_of


def outward_log_ratios(tokens: PolicyTokens) -> Tensor:
    """Return |log ρ| of the outward tokens, in float64 and without gradient; a flat tensor, ready to be gathered."""
    tokens = tokens.cleaned()
    log_ratio = (tokens.logprobs.detach() - tokens.behavior_logprobs).double()
    return log_ratio[_is_outward(log_ratio, tokens.advantages)].abs()


def second_moment_threshold(log_ratios_N: Tensor, tau: float) -> float:
    """Return the |log ρ| above which a step's outward tokens are masked; infinite where none needs to be.

    The tokens of the largest (log ρ)² are taken out until the mean of the rest is at most `tau`; equal ones go
    together. `log_ratios_N` are those of all micro-batches and ranks of the step, in any order.
    """
    squares = log_ratios_N.double().square().sort().values
    means = squares.cumsum(0) / torch.arange(1, len(squares) + 1, dtype=torch.float64, device=squares.device)
    kept = int((means <= tau).sum())  # the running mean of sorted values does not fall
    if kept == len(squares):
        return math.inf
    first_masked = float(squares[kept])
    below = squares[squares < first_masked]
    last_kept = float(below[-1]) if len(below) else 0.0
    return (math.sqrt(last_kept) + math.sqrt(first_masked)) / 2


def m2po(tokens: PolicyTokens, *, threshold: float) -> TokenLoss:
    """Return the M2PO loss: -M·ρ·A, M = 0 for outward tokens with |log ρ| > threshold, 1 for all others.

    See *Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs?* (Zheng et al., 2025,
    arXiv 2510.01161): the second moment of log ρ bounds the variance of the ratios, does not cancel as their mean
    does, and concerns few tokens even of very stale data. That outward tokens only are counted and masked is from the
    authors' code, which lets a masked token still count with the threshold in the mean; here it counts no more.
    """
    tokens = tokens.cleaned()
    log_ratio = tokens.logprobs - tokens.behavior_logprobs
    distance = log_ratio.detach()
    stopped = _is_outward(distance, tokens.advantages) & (distance.double().abs() > threshold)
    loss = keep(~stopped, -ratio_of(log_ratio) * tokens.advantages)
    return TokenLoss(loss, {"clipped": stopped.to(loss.dtype)})


def _is_outward(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    return log_ratio * advantages.sign() > 0
