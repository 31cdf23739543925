"""Aggregation: how the losses of tokens add up to the loss of a step.

Called where groups become samples (`rlsys.data.samples`), long before the forward pass: every sample gets one number,
the learner multiplies its token losses with it and adds over all micro-batches and ranks, without any further division.

Invariant: the sum of weight x loss over the tokens of a step is the step's loss, in whatever micro-batches and ranks
the samples are, and in whatever order they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def sample_weights(
    loss_tokens: Sequence[int],
    kind: Aggregation,
    *,
    num_trajectories: int,
    max_new_tokens: int,
    step_tokens: int | None = None,
) -> list[float]:
    """Return the factor of every token loss of each sample; `loss_tokens` are the tokens that count in each, |o|.

        token_mean     1 / N           the mean over the step's N tokens
        sequence_mean  1 / (B·|o|)     the mean over completions of the means over their tokens
        constant       1 / (B·M)       the sum over the step's tokens, in units that no policy can change

    B is `num_trajectories`, all trajectories taken for the step, also those that do not count (a failed score, cut at
    the limit): so it is known before the step is complete. M is `max_new_tokens`. N is `step_tokens`, known only when
    the step is complete; needed for `token_mean`. A sample without tokens gets 0.

    See *DAPO* (Yu et al., 2025, arXiv 2503.14476), section 3.3, for the first; *DeepSeekMath* (Shao et al., 2024, arXiv
    2402.03300), eq. 3, "GRPO", for the second, which weighs a token of a long completion less; *Understanding
    R1-Zero-Like Training* (Liu et al., 2025, arXiv 2503.20783), section 3, "Dr. GRPO", for the third.
    """
    match kind:
        case "token_mean":
            assert step_tokens is not None, "token_mean needs the number of tokens of the whole step"
            assert step_tokens >= sum(loss_tokens), f"{step_tokens} tokens in a step with {sum(loss_tokens)} here"
            return [1.0 / step_tokens if tokens else 0.0 for tokens in loss_tokens]
        case "sequence_mean":
            return [1.0 / (num_trajectories * tokens) if tokens else 0.0 for tokens in loss_tokens]
        case "constant":
            return [1.0 / (num_trajectories * max_new_tokens) if tokens else 0.0 for tokens in loss_tokens]


def is_streamable(kind: Aggregation) -> bool:
    """Whether the weights of a group are known before the step's last group is."""
    return kind != "token_mean"
