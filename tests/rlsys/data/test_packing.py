import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.data.packing import MicroBatch, TokenSlot, pack, separate_tokens
from rlsys.errors import DataError
from rlsys.types import TrainSample
from tests.rlsys.groups import make_sample

SAMPLES = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 30)), max_size=40).map(
    # Samples of a group share their prompt, whose length follows from the group.
    lambda drawn: [make_sample(group, 3 + group, length) for group, length in drawn]
)
SIZES = {"limit": st.integers(50, 200), "ranks": st.integers(1, 4)}


def pack_flat(samples: list[TrainSample], limit: int, ranks: int = 1) -> list[MicroBatch]:
    plan = pack(samples, micro_batch_tokens=limit, num_ranks=ranks, pad_token_id=99)
    return [batch for batches in plan for batch in batches]


def test_a_group_stands_behind_its_prompt_once() -> None:
    first, second = make_sample(0, prompt_tokens=3, continuation_tokens=2), make_sample(0, 3, 3)
    other = make_sample(1, 2, 4)
    (batch,) = pack_flat([first, other, second], 50)
    ids = [*first.prompt.token_ids, *first.continuation_ids_T, *second.continuation_ids_T,
           *other.prompt.token_ids, *other.continuation_ids_T]  # fmt: skip
    assert batch.input_ids_T.tolist() == ids
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert batch.samples_BL.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 5, 6, 7], [8, 9, 10, 11, 12, 13]]
    # The prompt's tokens take their output from their first sample; row * 6 + column elsewhere.
    assert batch.places_T.tolist() == [0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    assert batch.loss_tokens_N.tolist() == [3, 4, 5, 6, 7, 10, 11, 12, 13]
    assert batch.predictors_N.tolist() == [2, 3, 2, 5, 6, 9, 10, 11, 12]
    assert batch.sequences_N.tolist() == [0, 0, 2, 2, 2, 1, 1, 1, 1]
    assert batch.slots == (TokenSlot(1, 2, "key-0"),)
    assert (batch.num_tokens, separate_tokens([first, other, second])) == (14, 5 + 6 + 6)


def test_each_loss_token_carries_its_samples_numbers() -> None:
    first, second = make_sample(0, 3, 2), make_sample(0, 3, 3)
    (batch,) = pack_flat([first, second], 50)
    np.testing.assert_array_equal(
        batch.behavior_logprobs_N, np.concatenate([first.behavior_logprobs_T, second.behavior_logprobs_T])
    )
    np.testing.assert_array_equal(batch.versions_N, np.concatenate([first.versions_T, second.versions_T]))
    np.testing.assert_allclose(batch.advantages_N, [first.advantage] * 2 + [second.advantage] * 3)
    np.testing.assert_allclose(batch.weights_N, [first.token_weight] * 2 + [second.token_weight] * 3)


def test_a_mask_inside_a_continuation_leaves_its_token_in_the_line_and_out_of_the_loss() -> None:
    sample = make_sample(0, 3, 3)
    sample.loss_mask_T[1] = 0.0
    (batch,) = pack_flat([sample], 50)
    assert batch.num_tokens == 6
    assert batch.loss_tokens_N.tolist() == [3, 5]
    assert batch.predictors_N.tolist() == [2, 4]
    np.testing.assert_array_equal(batch.versions_N, sample.versions_T[[0, 2]])


@settings(deadline=None)
@given(samples=SAMPLES, **SIZES)
def test_every_sample_is_packed_exactly_once_and_reads_as_it_was(
    samples: list[TrainSample], limit: int, ranks: int
) -> None:
    found: dict[int, tuple[list[int], list[int], list[int]]] = {}
    for batch in pack_flat(samples, limit, ranks):
        row_of = {int(place) // batch.samples_BL.shape[1]: int(token) for token, place in enumerate(batch.places_T)}
        assert set(row_of) == set(range(len(batch.samples_BL))), "every row has a token of its own"
        for number in np.unique(batch.sequences_N).tolist():
            mine = batch.loss_tokens_N[batch.sequences_N == number]
            row = batch.samples_BL[int(batch.places_T[mine[0]]) // batch.samples_BL.shape[1]]
            tokens = row[: samples[number].num_tokens]
            assert number not in found
            found[number] = (
                batch.input_ids_T[tokens].tolist(), batch.position_ids_T[tokens].tolist(), mine.tolist()
            )  # fmt: skip
            # The predictor of a token is the one before it in its own sample.
            before = {int(token): int(previous) for previous, token in itertools.pairwise(tokens)}
            predictors = batch.predictors_N[batch.sequences_N == number]
            assert [before[int(token)] for token in mine] == predictors.tolist()
        for slot in batch.slots:
            assert batch.position_ids_T[slot.start] == 1
    assert sorted(found) == list(range(len(samples)))
    for number, (ids, positions, mine) in found.items():
        sample = samples[number]
        assert ids == [*sample.prompt.token_ids, *sample.continuation_ids_T.tolist()]
        assert positions == list(range(sample.num_tokens))
        assert len(mine) == len(sample.continuation_ids_T)


@settings(deadline=None)
@given(samples=SAMPLES, **SIZES)
def test_sizes_stay_within_their_limits_on_every_rank(samples: list[TrainSample], limit: int, ranks: int) -> None:
    plan = pack(samples, micro_batch_tokens=limit, num_ranks=ranks, pad_token_id=99)
    assert len(plan) == ranks
    (rounds,) = {len(batches) for batches in plan}
    batches = [batch for batches in plan for batch in batches]
    assert all(batch.num_tokens <= limit for batch in batches)
    full = [batch for batch in batches if len(batch.loss_tokens_N)]
    # No round more than the micro-batches need, at least one so that every rank takes part.
    assert rounds == max(1, -(-len(full) // ranks))


def test_surplus_micro_batches_are_empty_but_can_be_run() -> None:
    plan = pack([make_sample(0, 5, 5)], micro_batch_tokens=20, num_ranks=2, pad_token_id=99)
    (empty,) = plan[1]
    assert empty.input_ids_T.tolist() == [99, 99]
    assert empty.position_ids_T.tolist() == [0, 1]
    assert empty.samples_BL.tolist() == [[0, 1]]
    assert empty.places_T.tolist() == [0, 1]
    assert (len(empty.loss_tokens_N), empty.slots) == (0, ())


def test_no_samples_are_one_empty_micro_batch_on_each_rank() -> None:
    plan = pack([], micro_batch_tokens=20, num_ranks=3, pad_token_id=99)
    assert [[len(batch.loss_tokens_N) for batch in batches] for batches in plan] == [[0], [0], [0]]


def test_a_group_longer_than_a_micro_batch_is_split_behind_a_prompt_each() -> None:
    # Prompt 4, three continuations of 6: 4+6+6 = 16 tokens fit, the third does not.
    batches = pack_flat([make_sample(0, 4, 6) for _ in range(3)], 16)
    assert sorted(batch.num_tokens for batch in batches) == [10, 16]


def test_ranks_get_their_even_share() -> None:
    # Ten samples of 10 tokens fit in one micro-batch of 100, but the second rank would have nothing to do.
    plan = pack([make_sample(group, 5, 5) for group in range(10)], micro_batch_tokens=100, num_ranks=2, pad_token_id=9)
    assert [[batch.num_tokens for batch in batches] for batches in plan] == [[50], [50]]


def test_a_packing_that_only_first_fit_decreasing_finds_is_used() -> None:
    # Bins of 10: 6+4 and 5+3+2. Always taking the emptiest gives 6+3 | 5+4 and then 2 fits in neither.
    samples = [make_sample(group, 1, length - 1) for group, length in enumerate([6, 5, 4, 3, 2])]
    assert [batch.num_tokens for batch in pack_flat(samples, 10)] == [10, 10]


def test_the_same_samples_are_packed_in_the_same_way() -> None:
    samples = [make_sample(group, 4, 1 + group % 3) for group in range(20)]
    for one, other in zip(pack_flat(samples, 16, 2), pack_flat(samples, 16, 2), strict=True):
        np.testing.assert_array_equal(one.sequences_N, other.sequences_N)


def test_a_sample_as_long_as_a_micro_batch_fits() -> None:
    (batch,) = pack_flat([make_sample(0, 4, 8)], 12)
    assert batch.num_tokens == 12


def test_a_sample_longer_than_a_micro_batch_is_refused_with_its_numbers() -> None:
    with pytest.raises(DataError, match=r"group 7 \(problem p7\): a sample of 13 .* a micro-batch of 12") as error:
        pack_flat([make_sample(0, 4, 4), make_sample(7, 5, 8)], 12)
    assert "learner.micro_batch_tokens" in str(error.value)


def test_samples_of_one_group_with_several_prompts_are_refused() -> None:
    with pytest.raises(AssertionError, match="group 0 has samples of several prompts"):
        pack_flat([make_sample(0, 4, 4), make_sample(0, 5, 4)], 50)
