"""The loss of supervised fine-tuning: the warm start imitates demonstrations.

Same place in the learner and same contract as the policy losses (`rlsys.algorithms.losses`): a token's loss depends on
that token alone, and the caller multiplies it with the weight of its sample and adds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.tokens import TokenLoss


def nll(logprobs: Tensor, mask: Tensor) -> TokenLoss:
    """Return the negative log-likelihood `-log π` of each token (nats), 0 where the mask is 0; one common shape."""
    assert logprobs.shape == mask.shape, f"the arguments of a loss have one shape, got {logprobs.shape}, {mask.shape}"
    loss = torch.where(mask > 0, -logprobs, torch.zeros_like(logprobs))
    return TokenLoss(loss, {"clipped": torch.zeros_like(loss)})
