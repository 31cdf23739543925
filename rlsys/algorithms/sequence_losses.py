"""The policy loss whose ratio belongs to a completion and not to a token.

Same place and contract as `rlsys.algorithms.losses`. The mean runs over the tokens that count of one completion, found
by number: packing several completions in a row, padding, and the order of tokens change nothing.
"""

from __future__ import annotations

from rlsys.algorithms.losses import clipped_surrogate
from rlsys.algorithms.tokens import PolicyTokens, TokenLoss, ratio_of, sequence_sums


def gspo(tokens: PolicyTokens, *, epsilon_low: float = 3e-4, epsilon_high: float = 4e-4) -> TokenLoss:
    """Return the GSPO loss of each token: one clipped ratio for each completion, the geometric mean of its tokens'.

    -min(s_t·A, clip(s_t, 1 - ε_low, 1 + ε_high)·A),  s_t = sg(s)·π/sg(π),  s = exp(mean over the completion of log π/μ)

    s_t has the value of s and the gradient of the token's own log π (GSPO-token). Each token so gets the gradient
    -s·A·∇log π, and the mean over a completion has that of GSPO's own -min(s·A, clip(s)·A); its aggregation is the mean
    over completions.

    See *Group Sequence Policy Optimization* (Zheng et al., 2025, arXiv 2507.18071), eqs. 5 to 7, 13 and 14, and section
    5.1 for the bounds, which are those of a mean and so far smaller than PPO's.
    """
    tokens = tokens.cleaned()
    sums, counts = sequence_sums((tokens.logprobs - tokens.behavior_logprobs).detach(), tokens)
    own = tokens.logprobs - tokens.logprobs.detach()
    ratio = ratio_of(sums / counts + own)
    loss, stopped = clipped_surrogate(ratio, tokens.advantages, epsilon_low, epsilon_high)
    return TokenLoss(loss, {"clipped": stopped.to(loss.dtype)})
