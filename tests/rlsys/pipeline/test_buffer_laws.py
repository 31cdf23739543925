"""The laws of the buffer under random paces, and proof that each planted defect breaks one of them."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.ledger import DropReason
from rlsys.pipeline.staleness import StrictStaleness
from rlsys.types import TrajectoryGroup
from tests.rlsys.pipeline.simulation import Outcome, Pace, Simulation, check_laws, run_checked
from tests.rlsys.virtual_time import run_virtual

SEEDS = range(6)
BOUNDS = st.sampled_from([0, 1, 3])
PACES = st.builds(
    Pace,
    learn_seconds=st.sampled_from([0.0, 0.1, 1.0, 20.0]),
    load_seconds=st.sampled_from([0.0, 0.3, 5.0]),
    group_seconds=st.sampled_from([0.0, 1.0]),
    drop_rate=st.sampled_from([0.0, 0.3, 0.8]),
)


class UncheckedStaleness(StrictStaleness):
    """Without the assertion at consumption, so that the rules of admission are seen to hold the bound by themselves."""

    def check(self, batch: Sequence[TrajectoryGroup], learner_version: int) -> None:
        pass


@settings(deadline=None, max_examples=80)
@given(bound=BOUNDS, groups_per_step=st.sampled_from([1, 4]), pace=PACES, seed=st.integers(0, 10**6))
def test_the_laws_hold_for_any_order_of_events(bound: int, groups_per_step: int, pace: Pace, seed: int) -> None:
    run_checked(TrajectoryBuffer, UncheckedStaleness(bound, groups_per_step), pace, seed, steps=25)


@pytest.mark.parametrize("groups_per_step", [1, 4])
@pytest.mark.parametrize("bound", [0, 1, 3])
def test_a_slow_learner_reaches_the_bound(bound: int, groups_per_step: int) -> None:
    pace = Pace(learn_seconds=20.0, drop_rate=0.2)
    outcome = run_checked(TrajectoryBuffer, UncheckedStaleness(bound, groups_per_step), pace, seed=1, steps=40)
    assert max(outcome.staleness) == bound
    assert outcome.most_held == (bound + 1) * groups_per_step


@settings(deadline=None, max_examples=60)
@given(bound=BOUNDS, pace=PACES, seed=st.integers(0, 10**6), killed_after=st.floats(0.0, 60.0))
def test_a_run_killed_at_any_moment_goes_on_without_losing_or_repeating_a_group(
    bound: int, pace: Pace, seed: int, killed_after: float
) -> None:
    policy = UncheckedStaleness(bound, 4)

    async def first_sitting() -> tuple[bytes, int, int, Outcome]:
        buffer = TrajectoryBuffer(policy)
        simulation = Simulation(buffer, pace, seed)
        running = asyncio.create_task(simulation.run(25))
        await asyncio.wait([running], timeout=killed_after)
        outcome = copy.deepcopy(simulation.outcome)  # the loop may still turn once before it ends
        outcome.batches = outcome.batches[: simulation.version]  # the last one may be in training
        return pickle.dumps(buffer.snapshot()), simulation.drawn, simulation.version, outcome

    async def second_sitting() -> Outcome:
        buffer = TrajectoryBuffer.restore(policy, pickle.loads(snapshot), version)
        simulation = Simulation(buffer, pace, seed + 1, version=version, drawn=drawn)
        outcome = await simulation.run(10)
        outcome.batches = first.batches + outcome.batches
        outcome.dropped += first.dropped
        outcome.generated_tokens += first.generated_tokens
        check_laws(buffer, outcome, bound=bound, groups_per_step=4)
        return outcome

    snapshot, drawn, version, first = run_virtual(first_sitting())
    assert len(run_virtual(second_sitting()).batches) == version + 10


class NewestFirst(UncheckedStaleness):
    def select(self, waiting: Sequence[int], finished: Container[int]) -> tuple[int, ...] | None:
        return super().select(waiting[-self.groups_per_step :], finished)


class AnyFinished(UncheckedStaleness):
    def select(self, waiting: Sequence[int], finished: Container[int]) -> tuple[int, ...] | None:
        return super().select([ticket for ticket in waiting if ticket in finished], finished)


class IncompleteBatch(UncheckedStaleness):
    def select(self, waiting: Sequence[int], finished: Container[int]) -> tuple[int, ...] | None:
        return tuple(ticket for ticket in waiting[:4] if ticket in finished) or None


class OneSlotTooMany(UncheckedStaleness):
    def may_admit(self, num_held: int) -> bool:
        return num_held <= self.required_capacity


class OneBatchTooMany(UncheckedStaleness):
    def may_admit(self, num_held: int) -> bool:
        return num_held < self.required_capacity + self.groups_per_step


class OneSlotTooFew(UncheckedStaleness):
    def may_admit(self, num_held: int) -> bool:
        return num_held < self.required_capacity - 1


POLICY_DEFECTS = [NewestFirst, AnyFinished, IncompleteBatch, OneSlotTooMany, OneBatchTooMany]


class DropKeepsSlot(TrajectoryBuffer):
    lost = 0

    def drop(self, ticket: int, reason: DropReason, tokens: int) -> None:
        super().drop(ticket, reason, tokens)
        self.lost += 1

    @property
    def num_held(self) -> int:
        return super().num_held + self.lost


class DropWakesNobody(TrajectoryBuffer):
    def drop(self, ticket: int, reason: DropReason, tokens: int) -> None:
        events = self._slot_freed, self._batch_changed
        self._slot_freed, self._batch_changed = asyncio.Event(), asyncio.Event()
        super().drop(ticket, reason, tokens)
        self._slot_freed, self._batch_changed = events


class DropForgetsTokens(TrajectoryBuffer):
    def drop(self, ticket: int, reason: DropReason, tokens: int) -> None:
        super().drop(ticket, reason, 0)


class PutWakesNobody(TrajectoryBuffer):
    def put(self, group: TrajectoryGroup) -> None:
        event, self._batch_changed = self._batch_changed, asyncio.Event()
        super().put(group)
        self._batch_changed = event


class ReleaseWakesNobody(TrajectoryBuffer):
    def release(self, tickets: Sequence[int]) -> None:
        event, self._slot_freed = self._slot_freed, asyncio.Event()
        super().release(tickets)
        self._slot_freed = event


class ReleaseLosesASlot(TrajectoryBuffer):
    def release(self, tickets: Sequence[int]) -> None:
        super().release(tickets)
        self._awaiting_load.append(tickets[0])


class FreesSlotsWhenTaken(TrajectoryBuffer):
    @property
    def num_held(self) -> int:
        return len(self._in_flight) + self.depth

    async def take_batch(self, learner_version: int) -> list[TrajectoryGroup]:
        batch = await super().take_batch(learner_version)
        self._slot_freed.set()
        return batch


class FreesSlotsWhenTrained(TrajectoryBuffer):
    @property
    def num_held(self) -> int:
        return len(self._in_flight) + self.depth + len(self._in_training)

    def record_trained(self, trained_tokens: Mapping[int, int]) -> None:
        super().record_trained(trained_tokens)
        self._slot_freed.set()


class TrainsTwice(TrajectoryBuffer):
    async def take_batch(self, learner_version: int) -> list[TrajectoryGroup]:
        batch = await super().take_batch(learner_version)
        if learner_version == 5:
            self._finished[batch[0].ticket] = batch[0]
        return batch


BUFFER_DEFECTS = [
    DropKeepsSlot,
    DropWakesNobody,
    DropForgetsTokens,
    PutWakesNobody,
    ReleaseWakesNobody,
    ReleaseLosesASlot,
    FreesSlotsWhenTaken,
    FreesSlotsWhenTrained,
    TrainsTwice,
]
WITH_DROPS = Pace(learn_seconds=8.0, load_seconds=6.0, drop_rate=0.3)


@lru_cache
def run_all(buffer_type: type[TrajectoryBuffer], policy: StrictStaleness, pace: Pace) -> None:
    for seed in SEEDS:
        run_checked(buffer_type, policy, pace, seed, steps=30)


def assert_caught(buffer_type: type[TrajectoryBuffer], policy: StrictStaleness, pace: Pace) -> None:
    """Some seed breaks a law; a run without the defect passes with every seed."""
    run_all(TrajectoryBuffer, UncheckedStaleness(policy.bound, policy.groups_per_step), WITH_DROPS)
    with pytest.raises((AssertionError, ValueError)):
        run_all(buffer_type, policy, pace)


@pytest.mark.parametrize("bound", [1, 3])
@pytest.mark.parametrize("policy_type", POLICY_DEFECTS)
def test_a_defect_in_the_policy_is_caught(policy_type: type[StrictStaleness], bound: int) -> None:
    assert_caught(TrajectoryBuffer, policy_type(bound, 4), WITH_DROPS)


@pytest.mark.parametrize("bound", [0, 1])
@pytest.mark.parametrize("buffer_type", BUFFER_DEFECTS)
def test_a_defect_in_the_buffer_is_caught(buffer_type: type[TrajectoryBuffer], bound: int) -> None:
    assert_caught(buffer_type, UncheckedStaleness(bound, 4), WITH_DROPS)


def test_a_slot_too_few_stops_synchronous_training() -> None:
    assert_caught(TrajectoryBuffer, OneSlotTooFew(0, 4), WITH_DROPS)


@pytest.mark.parametrize("bound", [0, 1])
def test_a_release_before_the_load_is_caught(bound: int) -> None:
    pace = Pace(learn_seconds=8.0, load_seconds=6.0, drop_rate=0.3, release_before_load=True)
    assert_caught(TrajectoryBuffer, UncheckedStaleness(bound, 4), pace)


def test_the_assertion_at_consumption_catches_a_release_before_the_load() -> None:
    pace = Pace(learn_seconds=8.0, load_seconds=6.0, release_before_load=True)
    with pytest.raises(AssertionError, match=r"staleness 2 .*the bound is 1"):
        run_all(TrajectoryBuffer, StrictStaleness(1, 4), pace)
