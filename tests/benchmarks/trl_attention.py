"""Attention over packed sequences on a CPU, in the form in which TRL's AsyncGRPO calls FlashAttention 3.

Queries and keys of n sequences lie end to end; sequence i has its tokens in [cu_q[i], cu_q[i + 1]) and, in the keys,
[cu_k[i], cu_k[i + 1]). A query is one of the last of its sequence's keys: causal masks are aligned at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Plan(NamedTuple):
    """Where the tokens of each sequence lie. n sequences, at most Q queries and K keys."""

    queries_nQ: Tensor
    keys_nK: Tensor
    is_query_nQ: Tensor
    mask_n1QK: Tensor


class CpuFlashAttention:
    """Stands for the kernel's module: `_flash_attn()` returns it."""

    _last: tuple[tuple[Any, ...], _Plan] | None = None

    @classmethod
    def flash_attn_varlen_func(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        *_: Any,
        softmax_scale: float | None = None,
        **__: Any,
    ) -> Tensor:
        """Attention of [tokens, heads, width] packed tensors; grouped heads as in the kernel."""
        plan = cls._plan(cu_q, cu_k)
        repeats = q.shape[1] // k.shape[1]
        query = q[plan.queries_nQ].transpose(1, 2)
        key, value = (x.repeat_interleave(repeats, 1)[plan.keys_nK].transpose(1, 2) for x in (k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=plan.mask_n1QK, scale=softmax_scale
        )
        return attended.transpose(1, 2)[plan.is_query_nQ]

    @classmethod
    def _plan(cls, cu_q: Tensor, cu_k: Tensor) -> _Plan:
        """Made once for a batch: all layers call with the same lengths."""
        lengths = (tuple(cu_q.tolist()), tuple(cu_k.tolist()))
        if cls._last is None or cls._last[0] != lengths:
            cls._last = (lengths, _make_plan(cu_q.long(), cu_k.long()))
        return cls._last[1]


def _make_plan(cu_q: Tensor, cu_k: Tensor) -> _Plan:
    lengths_q, lengths_k = cu_q.diff(), cu_k.diff()
    steps_Q, steps_K = torch.arange(int(lengths_q.max())), torch.arange(int(lengths_k.max()))
    is_query_nQ, is_key_nK = steps_Q < lengths_q[:, None], steps_K < lengths_k[:, None]
    is_seen_nQK = steps_K <= steps_Q[None, :, None] + (lengths_k - lengths_q)[:, None, None]
    # What is no query attends to everything: a row without any key would be NaN, also in the gradient.
    mask_nQK = is_seen_nQK & (is_key_nK[:, None] | ~is_query_nQ[:, :, None])
    return _Plan(
        (cu_q[:-1, None] + steps_Q) * is_query_nQ,
        (cu_k[:-1, None] + steps_K) * is_key_nK,
        is_query_nQ,
        mask_nQK[:, None],
    )
