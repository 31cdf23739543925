"""Packing: samples of different lengths -> rows of bounded length -> micro-batches for each learner rank.

The last step before the learner. A row holds whole samples one after the other, and what is left at its end is
padding; positions start from 0 with each sample, by which the model keeps samples of one row apart, and the pad tail is
a segment of its own. All arrays are aligned with the tokens: what stands at position t belongs to token t, whose
log-probability comes from the logits at t-1.

    ids      p p p c c | p p c c c c | . .        p prompt, c continuation, . padding
    position 0 1 2 3 4 | 0 1 2 3 4 5 | 0 1
    sample   0 0 0 0 0 | 1 1 1 1 1 1 | -1 -1
    mask     0 0 0 1 1 | 0 0 1 1 1 1 | 0 0

Samples that follow each other in a step's list may land on different rows and ranks. Which micro-batch a token is in
never changes its loss: group and sample are arrays here, and the loss is normalised over the step.

Invariant: every token of every sample is in exactly one micro-batch; no row is longer than the limit; all ranks have
the same number of micro-batches (their collectives must match), the surplus ones being empty.
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
"""Tokens in the row of an empty micro-batch: the shortest row with a token that is predicted from another."""


class RowSlot(NamedTuple):
    """A DNA slot in a micro-batch."""

    row: int
    start: int
    """0-based position of the slot's first token in the row."""
    length: int
    key: str
    """Content key of the features, as in `DnaSlot`."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs forward and backward at once: B rows, T positions of the longest of them."""

    input_ids_BT: IntArray
    position_ids_BT: IntArray
    sample_BT: IntArray
    """Which sample of the packed list the token belongs to; -1 in padding."""
    loss_mask_BT: FloatArray
    advantages_BT: FloatArray
    """0 outside continuations."""
    behavior_logprobs_BT: FloatArray
    """0 outside continuations."""
    versions_BT: IntArray
    """The policy version that sampled the token; -1 outside continuations."""
    slots: tuple[RowSlot, ...]

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(np.count_nonzero(self.loss_mask_BT))

    @property
    def num_tokens(self) -> int:
        """Tokens of samples: padding left out."""
        return int(np.count_nonzero(self.sample_BT >= 0))


class _Placed(NamedTuple):
    """A sample with its place in the packed list."""

    place: int
    sample: TrainSample


_Row = list[_Placed]


def pack(
    samples: Sequence[TrainSample],
    *,
    row_tokens: int,
    rows_per_micro_batch: int,
    num_ranks: int,
    pad_token_id: int,
) -> list[list[MicroBatch]]:
    """Return the micro-batches of each rank.

    As few micro-batches as the rows need; rows are filled evenly, and ranks get rows of like length at the same time.
    The same samples in the same order are always packed in the same way. Raises DataError for a sample that is longer
    than `row_tokens`.
    """
    assert min(row_tokens, rows_per_micro_batch, num_ranks) >= 1, "sizes of a packing are 1 or more"
    rows = _fill_rows([_Placed(place, sample) for place, sample in enumerate(samples)], row_tokens, num_ranks)
    # Longest first and dealt in turn: row k of all ranks is of like length, and so is the work between collectives.
    rows.sort(key=lambda row: (-_num_tokens(row), row[0].place))
    num_micro_batches = max(1, -(-len(rows) // (num_ranks * rows_per_micro_batch)))
    plan: list[list[MicroBatch]] = []
    for rank in range(num_ranks):
        mine = rows[rank::num_ranks]
        starts = range(0, num_micro_batches * rows_per_micro_batch, rows_per_micro_batch)
        plan.append([_micro_batch(mine[start : start + rows_per_micro_batch], pad_token_id) for start in starts])
    return plan


def _fill_rows(placed: Sequence[_Placed], row_tokens: int, num_ranks: int) -> list[_Row]:
    """Return rows of at most `row_tokens`, as evenly filled as they can be without needing more of them.

    First-fit-decreasing finds how many rows are needed; each sample then goes to the shortest of so many rows. Where
    that does not fit, the rows of first-fit-decreasing stand.
    """
    for _, sample in placed:
        if sample.num_tokens > row_tokens:
            raise DataError(
                f"group {sample.group} (problem {sample.prompt.problem_id}): a sample of {sample.num_tokens} tokens "
                f"(prompt {len(sample.prompt.token_ids)}) is longer than a row of {row_tokens} tokens.\n"
                f"Raise learner.row_tokens, or lower the limits of the prompt or of new tokens."
            )
    longest_first = sorted(placed, key=lambda one: (-one.sample.num_tokens, one.place))
    rows = _first_fit(longest_first, row_tokens)
    # As many rows on each rank: an idle rank waits for the others at the next collective.
    num_rows = min(-(-len(rows) // num_ranks) * num_ranks, len(placed))
    even = _shortest_first(longest_first, num_rows)
    return even if max(map(_num_tokens, even), default=0) <= row_tokens else rows


def _first_fit(longest_first: Sequence[_Placed], row_tokens: int) -> list[_Row]:
    """Return rows to each of which no later sample could be added when it was its turn."""
    rows: list[_Row] = []
    used: list[int] = []
    for one in longest_first:
        length = one.sample.num_tokens
        row = next((row for row, tokens in enumerate(used) if tokens + length <= row_tokens), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(one)
        used[row] += length
    return rows


def _shortest_first(longest_first: Sequence[_Placed], num_rows: int) -> list[_Row]:
    """Return `num_rows` rows, each sample added to the shortest of them at its turn (the first of equal ones)."""
    rows: list[_Row] = [[] for _ in range(num_rows)]
    by_length = [(0, row) for row in range(num_rows)]
    for one in longest_first:
        tokens, row = by_length[0]
        rows[row].append(one)
        heapq.heapreplace(by_length, (tokens + one.sample.num_tokens, row))
    return rows


def _num_tokens(row: Iterable[_Placed]) -> int:
    return sum(one.sample.num_tokens for one in row)


def _micro_batch(rows: Sequence[_Row], pad_token_id: int) -> MicroBatch:
    """Return the arrays of `rows`, as long as the longest of them; an empty micro-batch for no rows."""
    num_rows, length = max(1, len(rows)), max((_num_tokens(row) for row in rows), default=EMPTY_LENGTH)
    shape = (num_rows, length)
    batch = MicroBatch(
        input_ids_BT=np.full(shape, pad_token_id, dtype=np.int64),
        position_ids_BT=np.zeros(shape, dtype=np.int64),
        sample_BT=np.full(shape, -1, dtype=np.int64),
        loss_mask_BT=np.zeros(shape, dtype=np.float32),
        advantages_BT=np.zeros(shape, dtype=np.float32),
        behavior_logprobs_BT=np.zeros(shape, dtype=np.float32),
        versions_BT=np.full(shape, -1, dtype=np.int64),
        slots=tuple(_row_slots(rows)),
    )
    for row in range(num_rows):
        start = 0
        for place, sample in rows[row] if rows else ():
            _write(batch, row, start, place, sample)
            start += sample.num_tokens
        batch.position_ids_BT[row, start:] = np.arange(length - start)
    return batch


def _write(batch: MicroBatch, row: int, start: int, place: int, sample: TrainSample) -> None:
    """Write one sample into a row of the arrays of `batch`."""
    middle, end = start + len(sample.prompt.token_ids), start + sample.num_tokens
    batch.input_ids_BT[row, start:middle] = sample.prompt.token_ids
    batch.input_ids_BT[row, middle:end] = sample.continuation_ids_T
    batch.position_ids_BT[row, start:end] = np.arange(end - start)
    batch.sample_BT[row, start:end] = place
    batch.loss_mask_BT[row, middle:end] = sample.loss_mask_T
    batch.advantages_BT[row, middle:end] = sample.advantage
    batch.behavior_logprobs_BT[row, middle:end] = sample.behavior_logprobs_T
    batch.versions_BT[row, middle:end] = sample.versions_T


def _row_slots(rows: Sequence[_Row]) -> Iterable[RowSlot]:
    """Yield the DNA slots of all samples at their places in the rows."""
    for row, placed in enumerate(rows):
        offset = 0
        for _, sample in placed:
            for slot in sample.prompt.slots:
                yield RowSlot(row, offset + slot.start, slot.length, slot.key)
            offset += sample.num_tokens
