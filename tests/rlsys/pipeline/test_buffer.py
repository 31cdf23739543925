"""Single behaviours of the buffer; its laws under load are in test_buffer_laws."""

import asyncio
import pickle
from collections.abc import Iterator
from itertools import count

import pytest

from rlsys.errors import CheckpointError
from rlsys.pipeline.buffer import Admission, BufferClosed, TrajectoryBuffer
from rlsys.pipeline.ledger import DropReason
from rlsys.pipeline.staleness import EvictStaleness, StrictStaleness, WindowedStaleness
from tests.rlsys.groups import make_group, make_problem, make_trajectory
from tests.rlsys.virtual_time import Deadlock, run_virtual


async def admit(buffer: TrajectoryBuffer, number: int) -> list[Admission]:
    return [await buffer.admit(lambda: make_problem(buffer.ledger.counts().groups_admitted)) for _ in range(number)]


def put(buffer: TrajectoryBuffer, *tickets: int, version: int = 0) -> None:
    for ticket in tickets:
        buffer.put(make_group(ticket, [make_trajectory([(version, 3)])]))


def tokens(*tickets: int) -> dict[int, int]:
    return dict.fromkeys(tickets, 3)


async def is_waiting(task: asyncio.Task[object]) -> bool:
    await asyncio.sleep(1)
    return not task.done()


def test_a_batch_comes_in_order_of_admission_whatever_finishes_first() -> None:
    async def run() -> list[int]:
        buffer = TrajectoryBuffer(StrictStaleness(1, 3))
        await admit(buffer, 6)
        put(buffer, 5, 2, 1, 4)
        taking = asyncio.create_task(buffer.take_batch(0))
        assert await is_waiting(taking)
        put(buffer, 0)
        return [group.ticket for group in await taking]

    assert run_virtual(run()) == [0, 1, 2]


def test_a_dropped_group_makes_room_for_the_next_oldest() -> None:
    async def run() -> list[int]:
        buffer = TrajectoryBuffer(StrictStaleness(1, 2))
        await admit(buffer, 3)
        put(buffer, 0, 2)
        taking = asyncio.create_task(buffer.take_batch(0))
        assert await is_waiting(taking)
        buffer.drop(1, DropReason.FILTERED, tokens=3)
        return [group.ticket for group in await taking]

    assert run_virtual(run()) == [0, 2]


def test_slots_return_when_the_weights_are_live_and_not_before() -> None:
    async def run() -> None:
        buffer = TrajectoryBuffer(StrictStaleness(0, 2))
        await admit(buffer, 2)
        admitting = asyncio.create_task(admit(buffer, 1))
        put(buffer, 0, 1)
        await buffer.take_batch(0)
        assert await is_waiting(admitting)
        buffer.record_trained(tokens(0, 1))
        assert await is_waiting(admitting)
        buffer.release([0, 1])
        assert [admission.ticket for admission in await admitting] == [2]

    run_virtual(run())


def test_no_problem_is_drawn_before_a_slot_is_there() -> None:
    async def run(problems: Iterator[int]) -> None:
        buffer = TrajectoryBuffer(StrictStaleness(0, 1))
        for _ in range(2):
            await buffer.admit(lambda: make_problem(next(problems)))

    problems = count()
    with pytest.raises(Deadlock):
        run_virtual(run(problems))
    assert next(problems) == 1


def test_closing_wakes_all_who_wait_and_says_why() -> None:
    async def run() -> list[object]:
        buffer = TrajectoryBuffer(StrictStaleness(0, 1))
        await admit(buffer, 1)
        tasks = asyncio.gather(admit(buffer, 1), buffer.take_batch(0), admit(buffer, 1), return_exceptions=True)
        await asyncio.sleep(1)
        buffer.close("the learner died")
        return list(await tasks)

    results = run_virtual(run())
    assert [(type(result), str(result)) for result in results] == [(BufferClosed, "the learner died")] * 3


def test_a_closed_buffer_admits_and_hands_out_nothing() -> None:
    async def run() -> None:
        buffer = TrajectoryBuffer(StrictStaleness(1, 1))
        await admit(buffer, 1)
        buffer.close("done")
        put(buffer, 0)
        with pytest.raises(BufferClosed, match="done"):
            await buffer.take_batch(0)
        with pytest.raises(BufferClosed, match="done"):
            await admit(buffer, 1)
        assert [group.ticket for group in buffer.snapshot().finished] == [0]

    run_virtual(run())


def test_a_group_is_handed_in_once() -> None:
    async def run() -> None:
        buffer = TrajectoryBuffer(StrictStaleness(0, 2))
        await admit(buffer, 1)
        put(buffer, 0)
        with pytest.raises(AssertionError, match="group 0 is not in flight"):
            put(buffer, 0)
        with pytest.raises(AssertionError, match="group 0 is not in flight"):
            buffer.drop(0, DropReason.FAILED, tokens=0)
        with pytest.raises(AssertionError, match="group 1 is not in flight"):
            put(buffer, 1)

    run_virtual(run())


def test_only_a_batch_that_was_taken_is_recorded_as_trained() -> None:
    async def run() -> None:
        buffer = TrajectoryBuffer(StrictStaleness(0, 1))
        await admit(buffer, 1)
        put(buffer, 0)
        with pytest.raises(AssertionError, match=r"groups \[0\] are recorded as trained, but \[\] are in training"):
            buffer.record_trained(tokens(0))

    run_virtual(run())


def test_a_batch_is_recorded_as_a_whole() -> None:
    async def run() -> None:
        buffer = TrajectoryBuffer(StrictStaleness(0, 2))
        await admit(buffer, 2)
        put(buffer, 0, 1)
        await buffer.take_batch(0)
        with pytest.raises(AssertionError, match=r"groups \[0\] are recorded as trained, but \[0, 1\] are in training"):
            buffer.record_trained(tokens(0))

    run_virtual(run())


def test_a_batch_is_streamed_as_its_groups_finish() -> None:
    async def run() -> None:
        buffer = TrajectoryBuffer(StrictStaleness(1, 3))
        await admit(buffer, 6)
        put(buffer, 4, 2, 1)
        assert [group.ticket for group in await buffer.take_next(0)] == [1, 2]
        taking = asyncio.create_task(buffer.take_next(0))
        assert await is_waiting(taking)  # 4 is in the batch only if 0 and 3 are dropped
        buffer.drop(0, DropReason.FILTERED, tokens=3)
        assert await is_waiting(taking)
        buffer.drop(3, DropReason.FILTERED, tokens=3)
        assert [group.ticket for group in await taking] == [4]
        with pytest.raises(AssertionError, match="the batch is full"):
            await buffer.take_next(0)
        buffer.record_trained(tokens(1, 2, 4))
        put(buffer, 5)
        assert [group.ticket for group in await buffer.take_next(1)] == [5]
        with pytest.raises(AssertionError, match="a batch is begun"):
            await buffer.take_batch(1)

    run_virtual(run())


def test_a_slow_group_is_passed_by_the_window_and_no_more() -> None:
    async def run() -> None:
        buffer = TrajectoryBuffer(WindowedStaleness(3, 2, window=3))
        await admit(buffer, 5)
        put(buffer, 1, 2, 3, 4)
        assert [group.ticket for group in await buffer.take_batch(0)] == [1, 2]
        buffer.record_trained(tokens(1, 2))
        buffer.release([1, 2])
        taking = asyncio.create_task(buffer.take_batch(1))
        assert await is_waiting(taking)  # 3 and 4 would be the third and fourth to pass 0
        put(buffer, 0)
        assert [group.ticket for group in await taking] == [0, 3]

    run_virtual(run())


def test_eviction_gives_the_slot_back_and_counts_the_tokens() -> None:
    async def run() -> None:
        buffer = TrajectoryBuffer(EvictStaleness(0, 1))
        await admit(buffer, 1)
        put(buffer, 0, version=0)
        taking = asyncio.create_task(buffer.take_batch(1))
        assert await is_waiting(taking)
        assert 0 not in buffer
        assert buffer.num_held == 0
        assert buffer.ledger.counts().tokens_discarded[DropReason.STALE] == 3
        await admit(buffer, 1)
        put(buffer, 1, version=1)
        assert [group.ticket for group in await taking] == [1]

    run_virtual(run())


def test_the_buffer_contains_what_may_still_be_trained() -> None:
    async def run() -> None:
        buffer = await buffer_in_all_states()
        assert [ticket for ticket in range(6) if ticket in buffer] == [1, 2, 3]

    run_virtual(run())


def test_a_wait_over_its_deadline_says_who_waited_for_what() -> None:
    async def run() -> list[str]:
        buffer = TrajectoryBuffer(StrictStaleness(0, 3), deadline_seconds=60)
        await admit(buffer, 3)
        put(buffer, 2)
        waits = asyncio.gather(admit(buffer, 1), buffer.take_batch(0), return_exceptions=True)
        await asyncio.sleep(59)
        assert not waits.done()
        return [f"{type(error).__name__} {error}" for error in await waits]

    held = (
        "the buffer holds 2 groups in flight (the oldest is 0), 1 finished, 0 in training and 0 trained whose weights "
        "are not live; it has 3 slots"
    )
    assert run_virtual(run()) == [
        f"RoleError rollout_worker: admit (waiting for a slot) did not end within 60 s, its deadline\n{held}",
        "RoleError learner: take_batch (waiting for 3 of the 3 groups that version 0 still trains on) did not end "
        f"within 60 s, its deadline\n{held}",
    ]


async def buffer_in_all_states() -> TrajectoryBuffer:
    """S=6, P=1: 0 trained and unreleased, 1 in training, 2 finished, 3 in flight, 4 dropped."""
    buffer = TrajectoryBuffer(StrictStaleness(6, 1))
    await admit(buffer, 5)
    put(buffer, 0, 1, 2)
    buffer.drop(4, DropReason.FAILED, tokens=1)
    await buffer.take_batch(0)
    buffer.record_trained(tokens(0))
    await buffer.take_batch(1)
    return buffer


def test_a_snapshot_keeps_what_is_neither_trained_nor_dropped() -> None:
    async def run() -> None:
        snapshot = pickle.loads(pickle.dumps((await buffer_in_all_states()).snapshot()))
        assert [group.ticket for group in snapshot.finished] == [1, 2]
        assert snapshot.in_flight == (Admission(3, make_problem(3)),)
        assert snapshot.passers == ()  # 0 was trained, but is older than all that are left
        restored = TrajectoryBuffer.restore(StrictStaleness(6, 1), snapshot, learner_version=1)
        assert restored.in_flight() == [Admission(3, make_problem(3))]
        assert (restored.num_held, restored.depth, restored.capacity) == (3, 2, 7)
        assert restored.ledger.counts().groups_trained == 1
        assert [group.ticket for group in await restored.take_batch(1)] == [1]
        assert (await admit(restored, 1))[0].ticket == 5
        restored.ledger.check()

    run_virtual(run())


def test_a_snapshot_in_the_middle_of_a_streamed_batch_gives_all_of_it_back() -> None:
    async def run() -> None:
        buffer = TrajectoryBuffer(WindowedStaleness(2, 2, window=2))
        await admit(buffer, 4)
        put(buffer, 3, 1)
        assert [group.ticket for group in await buffer.take_next(0)] == [1, 3]
        assert buffer.snapshot().passers == ()  # nobody has passed 0: neither 1 nor 3 is trained
        restored = TrajectoryBuffer.restore(WindowedStaleness(2, 2, window=2), buffer.snapshot(), learner_version=0)
        assert [admission.ticket for admission in restored.in_flight()] == [0, 2]
        put(restored, 0)
        assert [group.ticket for group in await restored.take_batch(0)] == [0, 1]

    run_virtual(run())


def test_a_snapshot_knows_how_often_a_group_was_passed() -> None:
    async def run() -> None:
        policy = WindowedStaleness(2, 2, window=2)
        buffer = TrajectoryBuffer(policy)
        await admit(buffer, 4)
        put(buffer, 1, 2, 3)
        await buffer.take_batch(0)
        buffer.record_trained(tokens(1, 2))
        restored = TrajectoryBuffer.restore(policy, buffer.snapshot(), learner_version=1)
        await admit(restored, 1)
        put(restored, 4)
        assert await is_waiting(asyncio.create_task(restored.take_batch(1)))

    run_virtual(run())


def test_a_checkpoint_that_cannot_meet_a_stricter_bound_is_refused() -> None:
    async def run() -> None:
        snapshot = (await buffer_in_all_states()).snapshot()
        # Held: 1 and 2, written by version 0, and 3, yet to be written. At version 1 and P=1 they are used at versions
        # 1, 2 and 3: staleness 1, 2 and, written by version 1, 2.
        TrajectoryBuffer.restore(StrictStaleness(2, 1), snapshot, learner_version=1)
        with pytest.raises(CheckpointError, match="group 2, which this run would train at staleness 2; its bound is 1"):
            TrajectoryBuffer.restore(StrictStaleness(1, 1), snapshot, learner_version=1)

    run_virtual(run())
