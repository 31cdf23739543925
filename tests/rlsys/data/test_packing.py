import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.data.packing import MicroBatch, RowSlot, pack
from rlsys.errors import DataError
from rlsys.types import TrainSample
from tests.rlsys.groups import make_sample

SAMPLES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), max_size=40).map(
    lambda lengths: [make_sample(group, *sizes) for group, sizes in enumerate(lengths)]
)
SIZES = {"row_tokens": st.integers(50, 120), "rows": st.integers(1, 4), "ranks": st.integers(1, 4)}


def pack_flat(samples: list[TrainSample], row_tokens: int, rows: int, ranks: int) -> list[MicroBatch]:
    plan = pack(samples, row_tokens=row_tokens, rows_per_micro_batch=rows, num_ranks=ranks, pad_token_id=99)
    return [batch for batches in plan for batch in batches]


def test_a_row_holds_samples_one_after_the_other_and_then_padding() -> None:
    short, long = make_sample(0, prompt_tokens=3, continuation_tokens=2), make_sample(1, 2, 4)
    (batch,) = pack_flat([short, long], row_tokens=11, rows=1, ranks=1)
    np.testing.assert_array_equal(
        batch.input_ids_BT, [[*long.prompt.token_ids, *long.continuation_ids_T, *short.prompt.token_ids,
                              *short.continuation_ids_T]])  # fmt: skip
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]
    assert batch.sample_BT.tolist() == [[1] * 6 + [0] * 5]
    assert batch.loss_mask_BT.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(batch.versions_BT, [[-1, -1, *long.versions_T, -1, -1, -1, *short.versions_T]])
    behavior = [[0, 0, *long.behavior_logprobs_T, 0, 0, 0, *short.behavior_logprobs_T]]
    np.testing.assert_array_equal(batch.behavior_logprobs_BT, np.array(behavior, dtype=np.float32))
    advantages = np.array([[0, 0] + [long.advantage] * 4 + [0, 0, 0] + [short.advantage] * 2], dtype=np.float32)
    np.testing.assert_array_equal(batch.advantages_BT, advantages)
    assert batch.slots == (RowSlot(0, 6 + 1, 2, "key-0"),)
    assert (batch.num_tokens, batch.num_loss_tokens) == (11, 6)


def test_the_pad_tail_is_a_segment_of_its_own() -> None:
    batch = pack_flat([make_sample(0, 3, 4), make_sample(1, 3, 2)], row_tokens=8, rows=2, ranks=1)[0]
    # Rows of 7 and 5 tokens: trimmed to 7, although a row may have 8.
    assert batch.input_ids_BT.shape == (2, 7)
    assert batch.input_ids_BT[1, 5:].tolist() == [99, 99]
    assert batch.position_ids_BT[1].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.sample_BT[1].tolist() == [1, 1, 1, 1, 1, -1, -1]
    assert batch.versions_BT[1, 5:].tolist() == [-1, -1]
    assert batch.slots == (RowSlot(0, 1, 2, "key-0"), RowSlot(1, 1, 2, "key-1"))


def test_a_mask_inside_a_continuation_is_kept() -> None:
    sample = make_sample(0, 3, 3)
    sample.loss_mask_T[1] = 0.0
    (batch,) = pack_flat([sample], row_tokens=50, rows=1, ranks=1)
    assert batch.loss_mask_BT.tolist() == [[0, 0, 0, 1, 0, 1]]
    assert batch.num_loss_tokens == 2


@settings(deadline=None)
@given(samples=SAMPLES, **SIZES)
def test_every_token_is_packed_exactly_once(samples: list[TrainSample], row_tokens: int, rows: int, ranks: int) -> None:
    found: dict[int, list[tuple[list[int], ...]]] = {}
    slots: list[str] = []
    for batch in pack_flat(samples, row_tokens, rows, ranks):
        arrays = (batch.input_ids_BT, batch.position_ids_BT, batch.loss_mask_BT, batch.versions_BT)
        for row in range(len(batch.sample_BT)):
            for index in sorted(set(batch.sample_BT[row].tolist()) - {-1}):
                here = np.flatnonzero(batch.sample_BT[row] == index)
                found.setdefault(index, []).append(tuple(array[row, here].tolist() for array in arrays))
        for slot in batch.slots:
            slots.append(slot.key)
            assert batch.position_ids_BT[slot.row, slot.start] == 1
            assert samples[batch.sample_BT[slot.row, slot.start]].prompt.slots[0].key == slot.key
    assert sorted(slots) == sorted(slot.key for sample in samples for slot in sample.prompt.slots)
    assert found == {
        index: [(
            [*sample.prompt.token_ids, *sample.continuation_ids_T.tolist()],
            list(range(sample.num_tokens)),
            [0] * len(sample.prompt.token_ids) + sample.loss_mask_T.tolist(),
            [-1] * len(sample.prompt.token_ids) + sample.versions_T.tolist(),
        )]
        for index, sample in enumerate(samples)
    }  # fmt: skip


@settings(deadline=None)
@given(samples=SAMPLES, **SIZES)
def test_sizes_stay_within_their_limits_on_every_rank(
    samples: list[TrainSample], row_tokens: int, rows: int, ranks: int
) -> None:
    plan = pack(samples, row_tokens=row_tokens, rows_per_micro_batch=rows, num_ranks=ranks, pad_token_id=99)
    assert len(plan) == ranks
    (num_micro_batches,) = {len(batches) for batches in plan}
    used_rows = 0
    for batch in (batch for batches in plan for batch in batches):
        num_rows, length = batch.input_ids_BT.shape
        assert num_rows <= rows
        assert length <= row_tokens
        filled = (batch.sample_BT >= 0).any(axis=1)
        assert filled.all() or (num_rows, length, batch.num_loss_tokens) == (1, 2, 0)
        used_rows += int(filled.sum())
    # No micro-batch more than the rows need, at least one so that every rank takes part.
    assert num_micro_batches == max(1, -(-used_rows // (rows * ranks)))


def test_surplus_micro_batches_are_empty_but_can_be_run() -> None:
    plan = pack([make_sample(0, 5, 5)], row_tokens=20, rows_per_micro_batch=1, num_ranks=2, pad_token_id=99)
    (empty,) = plan[1]
    assert empty.input_ids_BT.tolist() == [[99, 99]]
    assert empty.position_ids_BT.tolist() == [[0, 1]]
    assert empty.sample_BT.tolist() == [[-1, -1]]
    assert (empty.num_tokens, empty.num_loss_tokens, empty.slots) == (0, 0, ())


def test_no_samples_are_one_empty_micro_batch_on_each_rank() -> None:
    plan = pack([], row_tokens=20, rows_per_micro_batch=2, num_ranks=3, pad_token_id=99)
    assert [[batch.num_tokens for batch in batches] for batches in plan] == [[0], [0], [0]]


def test_ranks_get_their_even_share() -> None:
    # Ten samples of 10 tokens fit in one row of 100, but the second rank would have nothing to do.
    samples = [make_sample(group, 5, 5) for group in range(10)]
    plan = pack(samples, row_tokens=100, rows_per_micro_batch=1, num_ranks=2, pad_token_id=99)
    assert [[batch.num_tokens for batch in batches] for batches in plan] == [[50], [50]]


def test_a_packing_that_only_first_fit_decreasing_finds_is_used() -> None:
    # Rows of 10: 6+4 and 5+3+2. Always taking the shortest row gives 6+3 | 5+4 and then 2 fits in neither.
    samples = [make_sample(group, 1, length - 1) for group, length in enumerate([6, 5, 4, 3, 2])]
    batches = pack_flat(samples, row_tokens=10, rows=1, ranks=1)
    assert [batch.num_tokens for batch in batches] == [10, 10]


def test_the_same_samples_are_packed_in_the_same_way() -> None:
    samples = [make_sample(group, 4, 1 + group % 3) for group in range(20)]
    first, second = (pack_flat(samples, row_tokens=16, rows=2, ranks=2) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.sample_BT, other.sample_BT)


def test_a_sample_as_long_as_a_row_fits() -> None:
    (batch,) = pack_flat([make_sample(0, 4, 8)], row_tokens=12, rows=1, ranks=1)
    assert batch.num_tokens == 12


def test_a_sample_longer_than_a_row_is_refused_with_its_numbers() -> None:
    with pytest.raises(DataError, match=r"group 7 \(problem p7\): a sample of 13 .* a row of 12 tokens") as error:
        pack_flat([make_sample(0, 4, 4), make_sample(7, 5, 8)], row_tokens=12, rows=1, ranks=1)
    assert "learner.row_tokens" in str(error.value)
