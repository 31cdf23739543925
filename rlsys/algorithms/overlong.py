"""The soft over-long punishment: a completion that nears the token limit pays for it before it is cut off.

Stands between the scores of a group and its advantages: the penalty is added to the rewards.

Invariant: it depends on a completion's length alone, falls continuously, and lies in [-weight, 0].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def over_long_penalty(
    lengths_G: Sequence[int] | NDArray[np.int64], *, max_new_tokens: int, buffer_tokens: int, weight: float
) -> NDArray[np.float64]:
    """Return what to add to the rewards of completions of `lengths_G` tokens.

    With L = `max_new_tokens`, C = `buffer_tokens` and |y| the length: 0 for |y| <= L - C, then
    weight · (L - C - |y|) / C, which is -weight at |y| = L, the length of a truncated completion.

    See *DAPO* (Yu et al., 2025, arXiv 2503.14476), equation 13, where the weight is 1.
    """
    assert 0 < buffer_tokens <= max_new_tokens, f"a buffer of {buffer_tokens} tokens in {max_new_tokens}"
    into_buffer_G = np.asarray(lengths_G, dtype=np.float64) - (max_new_tokens - buffer_tokens)
    return -weight * np.clip(into_buffer_G / buffer_tokens, 0.0, 1.0) + 0.0  # -0.0 + 0.0 is 0.0
