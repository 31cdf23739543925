"""Log-probabilities and entropies of chosen tokens, from hidden states, without the full [T, V] logits.

Called inside the policy's forward (`dna_llm`), so that under ZeRO-3 the head's weight is gathered once per forward and
once per backward, whatever the number of chunks. Invariant: the result does not depend on the chunk size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**24
"""64 MiB of float32."""


def token_logprobs(
    hidden_NH: Tensor,
    head_weight_VH: Tensor,
    head_bias_V: Tensor | None,
    target_ids_N: Tensor,
    *,
    temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (log p(target), entropy), both [N] float32, of softmax(head(hidden) / temperature).

    Natural logarithms; the logits are cast to float32 after the head, as vLLM does. About `max_logits` of them exist at
    a time: where there are more, they are recomputed in the backward pass instead of kept. Entropies carry a gradient
    only where a bonus asks for it. With N = 0 the head is still applied, to no rows, so that ranks stay in step.
    """
    chunk = max(1, max_logits // len(head_weight_VH))
    starts = range(0, max(len(target_ids_N), 1), chunk)
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    for start in starts:
        rows = slice(start, start + chunk)
        arguments = (hidden_NH[rows], head_weight_VH, head_bias_V, target_ids_N[rows], temperature, entropy_gradient)
        if torch.is_grad_enabled() and len(starts) > 1:
            logprobs_C, entropies_C = checkpoint(_chunk_logprobs, *arguments, use_reentrant=False)
        else:
            logprobs_C, entropies_C = _chunk_logprobs(*arguments)
        logprobs.append(logprobs_C)
        entropies.append(entropies_C)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk_logprobs(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_ids_C: Tensor,
    temperature: float,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    logits_CV = nn.functional.linear(hidden_CH, weight_VH, bias_V).float()
    if temperature != 1.0:
        logits_CV = logits_CV / temperature
    if not entropy_gradient:
        return cast("tuple[Tensor, Tensor]", _LogprobAndEntropy.apply(logits_CV, target_ids_C))
    log_probabilities_CV = torch.log_softmax(logits_CV, dim=-1)
    entropies_C = -(log_probabilities_CV.exp() * log_probabilities_CV).sum(dim=-1)
    return log_probabilities_CV.gather(-1, target_ids_C[:, None])[:, 0], entropies_C


class _LogprobAndEntropy(torch.autograd.Function):
    """log p(target) with its gradient, and the entropy without, from one pass over the logits.

    Keeps the probabilities p for the backward pass, d log p(target) / d logits = onehot(target) - p: with a large
    vocabulary the passes over [C, V] are what a small model's head costs beside its matrix product.
    """

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, target_ids_C: Tensor) -> tuple[Tensor, Tensor]:
        shifted_CV = logits_CV - logits_CV.amax(dim=-1, keepdim=True)
        probabilities_CV = shifted_CV.exp()
        sums_C = probabilities_CV.sum(dim=-1)
        probabilities_CV *= sums_C.reciprocal()[:, None]
        ctx.save_for_backward(probabilities_CV, target_ids_C)
        logprobs_C = shifted_CV.gather(-1, target_ids_C[:, None])[:, 0] - sums_C.log()
        entropies_C = sums_C.log() - torch.linalg.vecdot(probabilities_CV, shifted_CV)
        ctx.mark_non_differentiable(entropies_C)
        return logprobs_C, entropies_C

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probabilities_CV, target_ids_C = ctx.saved_tensors
        logprob_gradient_C = gradients[0]
        gradient_CV = probabilities_CV * -logprob_gradient_C[:, None]
        gradient_CV.scatter_add_(-1, target_ids_C[:, None], logprob_gradient_C[:, None])
        return gradient_CV, None
