"""The embedding service: each sequence is encoded once, many at a time, and a bad one fails only who asked for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.embedding_service import EmbeddingService
from rlsys.errors import DataError


class CountingEncoder:
    """Features are the length of the sequence; remembers what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def load(self) -> None:
        """Nothing to load."""

    def encode(self, sequences: Sequence[str]) -> list[NDArray[np.float32]]:
        self.batches.append(list(sequences))
        if any("X" in sequence for sequence in sequences):
            raise DataError("an X")
        return [np.full((2, 3), len(sequence), np.float32) for sequence in sequences]


def service(encoder: CountingEncoder, batch_size: int = 8, cache_bytes: int = 10**6) -> EmbeddingService:
    return EmbeddingService(lambda: encoder, batch_size, cache_bytes)  # pyright: ignore[reportArgumentType]


def test_requests_that_wait_together_are_encoded_together_and_each_sequence_once() -> None:
    encoder = CountingEncoder()

    async def ask() -> None:
        made = service(encoder)
        await made.embed({"first": "A"})
        await asyncio.gather(made.embed({"x": "AC", "y": "ACG"}), made.embed({"y": "ACG", "z": "ACGT"}))

    asyncio.run(ask())
    assert encoder.batches == [["A"], ["AC", "ACG", "ACGT"]]


def test_a_second_request_is_answered_from_the_cache() -> None:
    encoder = CountingEncoder()

    async def ask() -> tuple[int, int]:
        made = service(encoder)
        await made.embed({"x": "AC"})
        features, report = await made.embed({"x": "AC"})
        assert features["x"].tolist() == [[2, 2, 2], [2, 2, 2]]
        return report.hits, report.misses

    assert asyncio.run(ask()) == (1, 0)
    assert len(encoder.batches) == 1


def test_no_pass_has_more_sequences_than_the_batch_size() -> None:
    encoder = CountingEncoder()
    asyncio.run(service(encoder, batch_size=2).embed({str(n): "A" * (n + 1) for n in range(5)}))
    assert [len(batch) for batch in encoder.batches] == [2, 2, 1]


def test_an_error_reaches_who_asked_and_the_service_goes_on() -> None:
    encoder = CountingEncoder()

    async def ask() -> float:
        made = service(encoder)
        with pytest.raises(DataError, match="an X"):
            await made.embed({"bad": "AXA"})
        features, _ = await made.embed({"good": "ACGT"})
        return float(features["good"][0, 0])

    assert asyncio.run(ask()) == 4.0


def test_a_request_that_is_given_up_takes_nobody_with_it() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(CountingEncoder):
        def encode(self, sequences: Sequence[str]) -> list[NDArray[np.float32]]:
            begun.set()
            assert go_on.wait(5)
            return super().encode(sequences)

    async def ask() -> list[float]:
        made = service(Slow())
        given_up = asyncio.create_task(made.embed({"shared": "ACG"}))
        sharing = asyncio.create_task(made.embed({"shared": "ACG"}))
        await asyncio.to_thread(begun.wait, 5)
        given_up.cancel()
        await asyncio.sleep(0)
        go_on.set()
        found = [await sharing, await made.embed({"later": "ACGT"})]
        with pytest.raises(asyncio.CancelledError):
            await given_up
        return [float(next(iter(features.values()))[0, 0]) for features, _ in found]

    assert asyncio.run(asyncio.wait_for(ask(), 10)) == [3, 4]
