"""Least-recently-used cache of features in memory, bounded in bytes.

The key names the content (sequence, encoder, layer, dtype), so an entry is never stale and needs no invalidation.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray


class FeatureCache:
    """Features [S, E] by content key; the least recently used go first when `max_bytes` would be exceeded."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self.num_bytes = 0
        self.evictions = 0

    def get(self, key: str) -> NDArray[np.float32] | None:
        """The features, now the most recently used, or None."""
        features_SE = self._entries.get(key)
        if features_SE is not None:
            self._entries.move_to_end(key)
        return features_SE

    def put(self, key: str, features_SE: NDArray[np.float32]) -> None:
        """Keep the features; one entry larger than the whole cache is not kept."""
        if key in self._entries or features_SE.nbytes > self._max_bytes:
            return
        self._entries[key] = features_SE
        self.num_bytes += features_SE.nbytes
        while self.num_bytes > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.num_bytes -= evicted.nbytes
            self.evictions += 1

    def __len__(self) -> int:
        return len(self._entries)
