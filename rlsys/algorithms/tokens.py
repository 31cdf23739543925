"""What every policy loss reads and returns: the tokens of a micro-batch, and the loss of each.

Made by each learner rank from its forward pass, handed to the objective (`rlsys.algorithms.objective`) and through it
to one loss, one correction and the regularisers, which are pure functions of it. All tensors have one common shape,
packed N or padded BT: which completion a token belongs to is said by a field, never by where the token stands.

Notation in this package, per token: π probability under the policy that is trained (`logprobs` = log π); μ probability
under the policy that sampled it (`behavior_logprobs` = log μ); π_prox probability under the policy at the start of the
update (`proximal_logprobs`); A advantage; sg(x) is x without its gradient; natural logarithms.

Invariant: what a tensor holds where the mask is 0 (padding, infinities, NaN) reaches no loss, gradient or diagnostic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""|log ratio| at which a ratio stops growing: e^20 still multiplies and adds safely in float32, e^89 is infinite."""


@dataclass(frozen=True)
class PolicyTokens:
    """Tokens with their log-probabilities in nats; all fields have one shape."""

    logprobs: Tensor
    """log π, with gradient."""
    behavior_logprobs: Tensor
    """log μ, as the inference engine gave it."""
    advantages: Tensor
    mask: Tensor
    """1 where the token counts, 0 elsewhere."""
    sequences: Tensor
    """int64: number of the completion that the token belongs to, not negative where the mask is 1 and anything
    elsewhere. All tokens of a completion are in the same call."""
    proximal_logprobs: Tensor | None = None
    """log π_prox; None stands for log π, which is exact where a batch makes one optimizer step."""

    def __post_init__(self) -> None:
        tensors = (self.logprobs, self.behavior_logprobs, self.advantages, self.mask, self.sequences)
        shapes = {tuple(tensor.shape) for tensor in (*tensors, self.proximal)}
        assert len(shapes) == 1, f"the tokens of a loss have one shape, got {sorted(shapes)}"

    @property
    def proximal(self) -> Tensor:
        """The log-probabilities under π_prox, without gradient."""
        return self.logprobs.detach() if self.proximal_logprobs is None else self.proximal_logprobs

    @property
    def active(self) -> Tensor:
        """True where the token counts."""
        return self.mask > 0

    def cleaned(self) -> PolicyTokens:
        """Return the tokens with 0 in every floating-point field where the mask is 0: log-ratio 0, advantage 0.

        Before any arithmetic: a product with the mask afterwards would turn a masked infinity into NaN, in the loss or
        in its gradient.
        """
        active = self.active
        return PolicyTokens(
            logprobs=keep(active, self.logprobs),
            behavior_logprobs=keep(active, self.behavior_logprobs),
            advantages=keep(active, self.advantages),
            mask=self.mask,
            sequences=self.sequences,
            proximal_logprobs=None if self.proximal_logprobs is None else keep(active, self.proximal_logprobs),
        )


class TokenLoss(NamedTuple):
    """The loss of each token and what else is known about it; all in the shape of the arguments."""

    loss: Tensor
    diagnostics: dict[str, Tensor]
    """Detached, 0 where the mask is 0. `clipped` is always there: 1.0 where the trust region holds back the token's
    policy gradient."""


def keep(condition: Tensor, values: Tensor) -> Tensor:
    """Return `values` where `condition` holds and 0 elsewhere, also where values are not finite; so its gradient."""
    return torch.where(condition, values, torch.zeros_like(values))


def ratio_of(log_ratio: Tensor) -> Tensor:
    """Return exp of a log-ratio, held within e^±`MAX_LOG_RATIO`."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_sums(values: Tensor, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
    """Return, for each token, the sum of `values` over its completion, and the number of tokens in that sum.

    Only tokens with mask 1 are summed, in float64; both results have the shape of the tokens, the sum in the type of
    `values`, and are 0 and 1 where the mask is 0.
    """
    active = tokens.active
    numbers, place = torch.unique(tokens.sequences[active], return_inverse=True)
    zeros = torch.zeros(len(numbers), dtype=torch.float64, device=values.device)
    sums = zeros.index_add(0, place, values[active].double())
    counts = zeros.index_add(0, place, torch.ones_like(place, dtype=torch.float64))
    spread_sums, spread_counts = torch.zeros_like(values), torch.ones_like(values)
    spread_sums[active] = sums[place].to(values.dtype)
    spread_counts[active] = counts[place].to(values.dtype)
    return spread_sums, spread_counts
