"""Packing: samples -> micro-batches for each learner rank, with the prompt of a group in memory once.

The last step before the learner. A micro-batch is one flat line of tokens. The samples of a group stand together: their
prompt once, then their continuations, each of which goes on at the position where the prompt ends. `samples_BL` says
which tokens make up each sample; attention runs along its rows, so a continuation sees its prompt and itself.

    ids        p p p a a | b b b | q q c c c c         prompts p, q; continuations a, b, c
    position   0 1 2 3 4 | 3 4 5 | 0 1 2 3 4 5
    samples    [0 1 2 3 4 .] [0 1 2 5 6 7] [8 9 10 11 12 13]        . padding

Which micro-batch a sample is in never changes its loss: every token carries its own weight in the step's sum, and the
numbers of its group and sample are arrays here.

Invariant: every loss token of every sample is in exactly one micro-batch; no micro-batch holds more tokens than the
limit; all ranks have the same number of micro-batches (their collectives must match), the surplus ones being empty.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlsys.errors import DataError
from rlsys.types import FloatArray, IntArray, TrainSample

EMPTY_LENGTH = 2
"""Tokens in an empty micro-batch: the shortest line with a token that is predicted from another."""


class TokenSlot(NamedTuple):
    """A DNA slot in a micro-batch."""

    start: int
    """0-based position of the slot's first token in the line."""
    length: int
    key: str
    """Content key of the features, as in `DnaSlot`."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs forward and backward at once: T tokens, B samples of at most L tokens, N loss tokens."""

    input_ids_T: IntArray
    position_ids_T: IntArray
    samples_BL: IntArray
    """Places in the line of the tokens of each sample, in order; padded at the end with 0."""
    places_T: IntArray
    """Where each token of the line stands in `samples_BL` (row * L + column), in its first sample."""
    slots: tuple[TokenSlot, ...]

    loss_tokens_N: IntArray
    """Places in the line of the tokens that count in the loss."""
    predictors_N: IntArray
    """Places of the tokens before them in their samples, which predict them."""
    sequences_N: IntArray
    """Which sample of the packed list the token belongs to."""
    weights_N: FloatArray
    """Factor of the token's loss in the step's sum."""
    advantages_N: FloatArray
    behavior_logprobs_N: FloatArray
    versions_N: IntArray
    """The policy version that sampled the token."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the line: what the model runs."""
        return len(self.input_ids_T)


class _Placed(NamedTuple):
    """A sample with its place in the packed list."""

    place: int
    sample: TrainSample


@dataclass(frozen=True)
class _Unit:
    """Samples of one group that stand together, behind one prompt."""

    placed: tuple[_Placed, ...]
    num_tokens: int


def pack(
    samples: Sequence[TrainSample], *, micro_batch_tokens: int, num_ranks: int, pad_token_id: int
) -> list[list[MicroBatch]]:
    """Return the micro-batches of each rank.

    As few as the tokens need, evenly filled, and of like size on all ranks at the same time. The same samples in the
    same order are always packed in the same way. Raises DataError for a sample longer than `micro_batch_tokens`.
    """
    assert min(micro_batch_tokens, num_ranks) >= 1, "sizes of a packing are 1 or more"
    bins = _fill(_units(samples, micro_batch_tokens), micro_batch_tokens, num_ranks)
    # Longest first and dealt in turn: the k-th micro-batches of all ranks, between two collectives, are of like size.
    bins.sort(key=lambda units: (-_num_tokens(units), units[0].placed[0].place))
    rounds = max(1, -(-len(bins) // num_ranks))
    return [
        [_micro_batch(mine[index] if index < len(mine) else [], pad_token_id) for index in range(rounds)]
        for mine in (bins[rank::num_ranks] for rank in range(num_ranks))
    ]


def separate_tokens(samples: Iterable[TrainSample]) -> int:
    """Tokens that the model would run if every sample had a prompt of its own."""
    return sum(sample.num_tokens for sample in samples)


def _units(samples: Sequence[TrainSample], limit: int) -> list[_Unit]:
    """Return the samples by group, in order; a group that is longer than the limit is split, its prompt repeated."""
    groups: dict[int, list[_Placed]] = {}
    for place, sample in enumerate(samples):
        if sample.num_tokens > limit:
            raise DataError(
                f"group {sample.group} (problem {sample.prompt.problem_id}): a sample of {sample.num_tokens} tokens "
                f"(prompt {len(sample.prompt.token_ids)}) is longer than a micro-batch of {limit} tokens.\n"
                f"Raise learner.micro_batch_tokens, or lower the limits of the prompt or of new tokens."
            )
        groups.setdefault(sample.group, []).append(_Placed(place, sample))
    units: list[_Unit] = []
    for placed in groups.values():
        prompt = placed[0].sample.prompt
        assert all(one.sample.prompt is prompt or one.sample.prompt == prompt for one in placed), (
            f"group {placed[0].sample.group} has samples of several prompts"
        )
        together: list[_Placed] = []
        used = len(prompt.token_ids)
        for one in placed:
            added = len(one.sample.continuation_ids_T)
            if together and used + added > limit:
                units.append(_Unit(tuple(together), used))
                together, used = [], len(prompt.token_ids)
            together.append(one)
            used += added
        units.append(_Unit(tuple(together), used))
    return units


def _fill(units: Sequence[_Unit], limit: int, num_ranks: int) -> list[list[_Unit]]:
    """Return bins of at most `limit` tokens, as evenly filled as they can be without needing more of them.

    First-fit-decreasing finds how many bins are needed; each unit then goes to the emptiest of so many. Where that does
    not fit, the bins of first-fit-decreasing stand.
    """
    longest_first = sorted(units, key=lambda unit: (-unit.num_tokens, unit.placed[0].place))
    bins = _first_fit(longest_first, limit)
    # As many on each rank: an idle rank waits for the others at the next collective.
    even = _emptiest_first(longest_first, min(-(-len(bins) // num_ranks) * num_ranks, len(units)))
    return even if max(map(_num_tokens, even), default=0) <= limit else bins


def _first_fit(longest_first: Sequence[_Unit], limit: int) -> list[list[_Unit]]:
    bins: list[list[_Unit]] = []
    used: list[int] = []
    for unit in longest_first:
        place = next((place for place, tokens in enumerate(used) if tokens + unit.num_tokens <= limit), len(bins))
        if place == len(bins):
            bins.append([])
            used.append(0)
        bins[place].append(unit)
        used[place] += unit.num_tokens
    return bins


def _emptiest_first(longest_first: Sequence[_Unit], num_bins: int) -> list[list[_Unit]]:
    bins: list[list[_Unit]] = [[] for _ in range(num_bins)]
    by_tokens = [(0, place) for place in range(num_bins)]
    for unit in longest_first:
        tokens, place = by_tokens[0]
        bins[place].append(unit)
        heapq.heapreplace(by_tokens, (tokens + unit.num_tokens, place))
    return bins


def _num_tokens(units: Iterable[_Unit]) -> int:
    return sum(unit.num_tokens for unit in units)


class _Line:
    """Collects the arrays of one micro-batch."""

    def __init__(self) -> None:
        self.ids: list[IntArray] = []
        self.positions: list[IntArray] = []
        self.rows: list[IntArray] = []
        self.slots: list[TokenSlot] = []
        self.loss_tokens: list[IntArray] = []
        self.predictors: list[IntArray] = []
        self.masks: list[tuple[_Placed, IntArray]] = []
        self.length = 0

    def add(self, unit: _Unit) -> None:
        prompt = unit.placed[0].sample.prompt
        start, width = self.length, len(prompt.token_ids)
        self._append(np.array(prompt.token_ids, dtype=np.int64), first_position=0)
        self.slots += [TokenSlot(start + slot.start, slot.length, slot.key) for slot in prompt.slots]
        prompt_places = np.arange(start, start + width)
        for one in unit.placed:
            places = np.arange(self.length, self.length + len(one.sample.continuation_ids_T))
            self._append(one.sample.continuation_ids_T, first_position=width)
            row = np.concatenate([prompt_places, places])
            counted = np.flatnonzero(one.sample.loss_mask_T)
            self.rows.append(row)
            self.loss_tokens.append(places[counted])
            self.predictors.append(row[width - 1 + counted])
            self.masks.append((one, counted))

    def _append(self, ids_T: IntArray, first_position: int) -> None:
        self.ids.append(ids_T)
        self.positions.append(np.arange(first_position, first_position + len(ids_T)))
        self.length += len(ids_T)


def _micro_batch(units: Sequence[_Unit], pad_token_id: int) -> MicroBatch:
    """Return the arrays of `units`; an empty micro-batch for none."""
    line = _Line()
    for unit in units:
        line.add(unit)
    if not units:
        line.ids, line.positions = [np.full(EMPTY_LENGTH, pad_token_id)], [np.arange(EMPTY_LENGTH)]
        line.rows, line.length = [np.arange(EMPTY_LENGTH)], EMPTY_LENGTH
    longest = max(map(len, line.rows))
    samples_BL = np.zeros((len(line.rows), longest), dtype=np.int64)
    places_T = np.zeros(line.length, dtype=np.int64)
    for row in range(len(line.rows) - 1, -1, -1):  # a prompt's tokens are placed in their first sample
        tokens = line.rows[row]
        samples_BL[row, : len(tokens)] = tokens
        places_T[tokens] = row * longest + np.arange(len(tokens))
    kept = line.masks
    return MicroBatch(
        input_ids_T=_join(line.ids, np.int64),
        position_ids_T=_join(line.positions, np.int64),
        samples_BL=samples_BL,
        places_T=places_T,
        slots=tuple(line.slots),
        loss_tokens_N=_join(line.loss_tokens, np.int64),
        predictors_N=_join(line.predictors, np.int64),
        sequences_N=_join([np.full(len(counted), one.place) for one, counted in kept], np.int64),
        weights_N=_join(
            [(one.sample.token_weight * one.sample.loss_mask_T)[counted] for one, counted in kept], np.float32
        ),
        advantages_N=_join([np.full(len(counted), one.sample.advantage) for one, counted in kept], np.float32),
        behavior_logprobs_N=_join([one.sample.behavior_logprobs_T[counted] for one, counted in kept], np.float32),
        versions_N=_join([one.sample.versions_T[counted] for one, counted in kept], np.int64),
    )


def _join(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype=dtype)
