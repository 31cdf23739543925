"""The embedding service: the frozen DNA encoder behind a batching queue and a content-addressed cache.

Requests that arrive while the encoder runs are encoded together, up to `batch_size` sequences a pass; a sequence that
several requests want is encoded once. Features do not depend on the policy version, so the cache is valid for ever.

| waits | for | until | woken by |
|---|---|---|---|
| `embed` | features of its sequences | all are encoded or the encoder raised | `_encode_loop`, which sets the futures |
| `_encode_loop` | something to encode | a request arrives | `embed`, which sets `_work` |

Invariant: each key has at most one future, which only `_encode` ends; the encoder never sees a key that is cached or
under way. A request that is cancelled (its group was given up) leaves its sequences to be encoded for the cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actors.ports import EmbedReport, Features
from rlsys.data.feature_cache import FeatureCache

if TYPE_CHECKING:
    from rlsys.models.encoders import DnaEncoder


class EmbeddingService:
    """Encodes sequences, each once."""

    def __init__(self, make_encoder: Callable[[], DnaEncoder], batch_size: int, cache_bytes: int) -> None:
        """`make_encoder` is called here, in the service's own process. `cache_bytes` bounds the features in memory."""
        self._encoder = make_encoder()
        self._encoder.load()
        self._batch_size = batch_size
        self._cache = FeatureCache(cache_bytes)
        self._pending: dict[str, asyncio.Future[NDArray[np.float32]]] = {}
        self._sequences: dict[str, str] = {}
        self._work = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    async def embed(self, sequences_by_key: Mapping[str, str]) -> tuple[Features, EmbedReport]:
        """Features [S, E] of each sequence under its key, and what it cost."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._encode_loop())
        started = time.monotonic()
        cached = {key: features for key in sequences_by_key if (features := self._cache.get(key)) is not None}
        missing = {key: self._future(key, sequence) for key, sequence in sequences_by_key.items() if key not in cached}
        self._work.set()
        if missing:
            # Not gather: whoever gives up waiting would cancel the futures, which others wait for too.
            await asyncio.wait(missing.values())
        encoded = {key: future.result() for key, future in missing.items()}
        report = EmbedReport(hits=len(cached), misses=len(missing), seconds=time.monotonic() - started)
        return {key: cached.get(key, encoded.get(key)) for key in sequences_by_key}, report  # pyright: ignore[reportReturnType]

    def _future(self, key: str, sequence: str) -> asyncio.Future[NDArray[np.float32]]:
        if key not in self._pending:
            self._pending[key] = asyncio.get_running_loop().create_future()
            self._sequences[key] = sequence
        return self._pending[key]

    async def _encode_loop(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._sequences:
                keys = list(self._sequences)[: self._batch_size]
                await self._encode(keys, [self._sequences.pop(key) for key in keys])

    async def _encode(self, keys: Sequence[str], sequences: Sequence[str]) -> None:
        try:
            features = await asyncio.to_thread(self._encoder.encode, sequences)
        except Exception as error:  # noqa: BLE001 (handed to every request that waits for this batch)
            for key in keys:
                self._pending.pop(key).set_exception(error)
            return
        for key, features_SE in zip(keys, features, strict=True):
            self._cache.put(key, features_SE)
            self._pending.pop(key).set_result(features_SE)
