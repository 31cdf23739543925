"""Attention of a packed micro-batch: along the rows of `samples_BL`, not along the line of tokens.

Registered with transformers under the name `PACKED`, for language models that call the attention interface (Qwen3,
Llama, ...). Queries, keys and values are gathered into one row for each sample, a causal kernel without a mask runs on
the rows, and each token takes its output from its place. A prompt that several samples share is projected once; only
its attention is computed for each of them. Memory grows with the tokens of the rows, never with their square.

Invariant: a token's output depends on the earlier tokens of its own sample alone. Padding stands at the end of a row,
where a causal kernel shows it to no other token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED = "rlsys_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    samples_BL: Tensor | None = None,
    places_T: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention output [1, T, heads, D] for `query` [1, heads, T, D] and fewer or equal key heads.

    Without `samples_BL` each row of an ordinary batch is one sequence. `attention_mask` is None: nothing makes one for
    this implementation.
    """
    assert attention_mask is None, "packed attention has no mask: samples are told apart by samples_BL"
    if samples_BL is None or places_T is None:
        return _causal(query, key, value, scaling, dropout).transpose(1, 2).contiguous(), None
    rows = [tensor[0].transpose(0, 1)[samples_BL].transpose(1, 2) for tensor in (query, key, value)]
    output_BLHD = _causal(rows[0], rows[1], rows[2], scaling, dropout).transpose(1, 2)
    return output_BLHD.flatten(0, 1)[places_T][None], None


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _no_mask(**_: Any) -> None:
    return None


def register() -> None:
    """Teach transformers this attention; may be called any number of times."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)


register()
