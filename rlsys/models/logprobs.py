"""Log-probabilities and entropies of chosen tokens, from hidden states, without the full [T, V] logits.

Called inside the policy's forward (`dna_llm`), so that under ZeRO-3 the head's weight is gathered once per forward and
once per backward, whatever the number of chunks. Invariant: the result does not depend on the chunk size.
"""

from __future__ import annotations

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
    logits_CV = nn.functional.linear(hidden_CH, weight_VH, bias_V).float() / temperature
    log_normaliser_C = torch.logsumexp(logits_CV, dim=-1)
    logprobs_C = logits_CV.gather(-1, target_ids_C[:, None])[:, 0] - log_normaliser_C
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        probabilities_CV = torch.exp(logits_CV - log_normaliser_C[:, None])
        entropies_C = log_normaliser_C - (probabilities_CV * logits_CV).sum(dim=-1)
    return logprobs_C, entropies_C
