"""Proof that the laws see something: each planted defect, in a policy or in the buffer, breaks one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import pytest

from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.ledger import DropReason, Ledger
from rlsys.pipeline.staleness import StalenessPolicy, StrictStaleness
from rlsys.types import TrajectoryGroup
from tests.rlsys.pipeline.laws import run_checked
from tests.rlsys.pipeline.policies import UncheckedEvict, UncheckedStrict, UncheckedWindowed
from tests.rlsys.pipeline.simulation import Pace
from tests.rlsys.virtual_time import Deadlock

Passed = Callable[[int], int]
Tickets = tuple[int, ...]


class Scenario(NamedTuple):
    """A run that keeps the laws, until one part of it is replaced."""

    policy: StalenessPolicy
    pace: Pace


SLOW = Pace(learn_seconds=8.0, load_seconds=6.0, drop_rate=0.3)
STRICT = Scenario(UncheckedStrict(1, 4), SLOW)
SYNCHRONOUS = Scenario(UncheckedStrict(0, 4), SLOW)
STREAMED = Scenario(UncheckedStrict(1, 4), replace(SLOW, streaming=True))
WINDOWED = Scenario(UncheckedWindowed(2, 4, 4), Pace(learn_seconds=2.0, load_seconds=1.0, groups_at_once=40))
EVICTING = Scenario(UncheckedEvict(1, 4), Pace(learn_seconds=1.0, load_seconds=0.5))
LOSING = Scenario(UncheckedStrict(1, 4), replace(SLOW, seconds_between_losses=15.0, roll_out_again=True))


@lru_cache
def run_all(buffer_type: type[TrajectoryBuffer], scenario: Scenario) -> None:
    for seed in range(6):
        run_checked(buffer_type, scenario.policy, scenario.pace, seed, steps=30)


def assert_caught(scenario: Scenario, buffer_type: type[TrajectoryBuffer], policy: StalenessPolicy, pace: Pace) -> None:
    """Some seed breaks a law; a run without the defect passes with every seed."""
    run_all(TrajectoryBuffer, scenario)
    with pytest.raises((AssertionError, Deadlock)):
        run_all(buffer_type, Scenario(policy, pace))


# ---------------------------------------------------------------- policies


class NewestFirst(UncheckedStrict):
    def select(self, waiting: Iterable[int], finished: Collection[int], room: int, passed: Passed) -> Tickets:
        return super().select(list(waiting)[-room:], finished, room, passed)


class AnyFinished(UncheckedStrict):
    def select(self, waiting: Iterable[int], finished: Collection[int], room: int, passed: Passed) -> Tickets:
        return tuple(ticket for ticket in waiting if ticket in finished)[:room]


class OnePlaceTooMany(UncheckedStrict):
    def select(self, waiting: Iterable[int], finished: Collection[int], room: int, passed: Passed) -> Tickets:
        return super().select(waiting, finished, room + 1, passed)


class OneSlotTooMany(UncheckedStrict):
    def admit(self, held: int) -> bool:
        return held <= self.required_capacity


class OneBatchTooMany(UncheckedStrict):
    def admit(self, held: int) -> bool:
        return held < self.required_capacity + self.groups_per_step


class OneSlotTooFew(UncheckedStrict):
    def admit(self, held: int) -> bool:
        return held < self.required_capacity - 1


class FreesSlotsAtTheStep(UncheckedStrict):
    def release(self, awaiting_load: Sequence[int], live: Sequence[int]) -> Tickets:
        return tuple(awaiting_load)


class WindowOneTooWide(UncheckedWindowed):
    def select(self, waiting: Iterable[int], finished: Collection[int], room: int, passed: Passed) -> Tickets:
        return super().select(waiting, finished, room, lambda ticket: passed(ticket) - 1)


class WindowForgetsEarlierBatches(UncheckedWindowed):
    def select(self, waiting: Iterable[int], finished: Collection[int], room: int, passed: Passed) -> Tickets:
        return super().select(waiting, finished, room, lambda ticket: 0)


class WindowIsNotPaidFor(UncheckedWindowed):
    @property
    def required_capacity(self) -> int:
        return (self.bound + 1) * self.groups_per_step


class WindowPaysOneSlotTooFew(UncheckedWindowed):
    def admit(self, held: int) -> bool:
        return held <= self.required_capacity


class EvictsTooLate(UncheckedEvict):
    def evict(self, finished: Iterable[TrajectoryGroup], learner_version: int) -> Tickets:
        return super().evict(finished, learner_version - 1)


class EvictsTooEarly(UncheckedEvict):
    def evict(self, finished: Iterable[TrajectoryGroup], learner_version: int) -> Tickets:
        return super().evict(finished, learner_version + 1)


POLICY_DEFECTS: list[tuple[Scenario, type[StrictStaleness] | type[UncheckedEvict]]] = [
    (STRICT, NewestFirst),
    (STRICT, AnyFinished),
    (STREAMED, AnyFinished),
    (STREAMED, OnePlaceTooMany),
    (STRICT, OneSlotTooMany),
    (STRICT, OneBatchTooMany),
    (SYNCHRONOUS, OneSlotTooFew),
    (STRICT, FreesSlotsAtTheStep),
    (WINDOWED, WindowOneTooWide),
    (WINDOWED, WindowForgetsEarlierBatches),
    (WINDOWED, WindowIsNotPaidFor),
    (WINDOWED, WindowPaysOneSlotTooFew),
    (EVICTING, EvictsTooLate),
    (EVICTING, EvictsTooEarly),
]


@pytest.mark.parametrize(("scenario", "defect"), POLICY_DEFECTS)
def test_a_defect_in_a_policy_is_caught(
    scenario: Scenario, defect: type[StrictStaleness] | type[UncheckedEvict]
) -> None:
    assert_caught(scenario, TrajectoryBuffer, defect(**vars(scenario.policy)), scenario.pace)


# ---------------------------------------------------------------- the buffer


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


class ReleasesTwice(TrajectoryBuffer):
    freed_twice = 0

    def release(self, tickets: Sequence[int]) -> None:
        super().release(tickets)
        self.freed_twice += 1

    @property
    def num_held(self) -> int:
        return super().num_held - self.freed_twice


class FreesSlotsWhenTaken(TrajectoryBuffer):
    @property
    def num_held(self) -> int:
        return len(self._waiting)

    async def take_batch(self, learner_version: int) -> list[TrajectoryGroup]:
        batch = await super().take_batch(learner_version)
        self._slot_freed.set()
        return batch


class ForgetsTheOpenBatch(TrajectoryBuffer):
    """Takes P groups more, whatever was taken."""

    async def take_next(self, learner_version: int) -> list[TrajectoryGroup]:
        before, self._in_training = self._in_training, {}
        groups = await super().take_next(learner_version)
        self._in_training |= before
        return groups


class ForgetsWhoPassed(TrajectoryBuffer):
    def record_trained(self, trained_tokens: Mapping[int, int]) -> None:
        super().record_trained(trained_tokens)
        self._passers.clear()


class TrainsTwice(TrajectoryBuffer):
    async def take_batch(self, learner_version: int) -> list[TrajectoryGroup]:
        batch = await super().take_batch(learner_version)
        if learner_version == 5:
            self._finished[batch[0].ticket] = batch[0]
            self._waiting = {batch[0].ticket: batch[0].problem} | self._waiting
        return batch


class EvictionKeepsSlot(TrajectoryBuffer):
    @property
    def num_held(self) -> int:
        return super().num_held + self.ledger.counts().groups_dropped[DropReason.STALE]


class EvictionIsNotCounted(TrajectoryBuffer):
    def _end(self, ticket: int, reason: DropReason) -> None:
        if reason is DropReason.STALE:
            del self._waiting[ticket]
            self._slot_freed.set()
        else:
            super()._end(ticket, reason)


class ForgetfulLedger(Ledger):
    def generate(self, ticket: int, tokens: int) -> None:
        super().generate(ticket, tokens - (ticket == 7))


class LedgerForgetsAToken(TrajectoryBuffer):
    def __init__(self, policy: StalenessPolicy) -> None:
        super().__init__(policy)
        self.ledger = ForgetfulLedger()


BUFFER_DEFECTS: list[tuple[Scenario, type[TrajectoryBuffer]]] = [
    (STRICT, DropKeepsSlot),
    (EVICTING._replace(pace=replace(EVICTING.pace, drop_rate=0.3)), DropKeepsSlot),
    (SYNCHRONOUS, DropWakesNobody),
    (STRICT, DropForgetsTokens),
    (STRICT, PutWakesNobody),
    (STREAMED, PutWakesNobody),
    (STRICT, ReleaseWakesNobody),
    (SYNCHRONOUS, ReleaseLosesASlot),
    (STRICT, ReleasesTwice),
    (STRICT, FreesSlotsWhenTaken),
    (STREAMED, ForgetsTheOpenBatch),
    (WINDOWED, ForgetsWhoPassed),
    (STRICT, TrainsTwice),
    (EVICTING, EvictionKeepsSlot),
    (EVICTING, EvictionIsNotCounted),
    (STRICT, LedgerForgetsAToken),
]


@pytest.mark.parametrize(("scenario", "defect"), BUFFER_DEFECTS)
def test_a_defect_in_the_buffer_is_caught(scenario: Scenario, defect: type[TrajectoryBuffer]) -> None:
    assert_caught(scenario, defect, scenario.policy, scenario.pace)


# ---------------------------------------------------------------- round the buffer


@pytest.mark.parametrize("scenario", [SYNCHRONOUS, STRICT, STREAMED, WINDOWED])
def test_a_release_before_the_load_is_caught(scenario: Scenario) -> None:
    pace = replace(scenario.pace, release_before_load=True, load_seconds=6.0)
    assert_caught(scenario, TrajectoryBuffer, scenario.policy, pace)


def test_a_worker_that_comes_back_with_old_weights_is_caught() -> None:
    assert_caught(LOSING, TrajectoryBuffer, LOSING.policy, replace(LOSING.pace, returns_outdated=True))


def test_the_assertion_at_consumption_catches_a_release_before_the_load() -> None:
    pace = replace(SLOW, release_before_load=True)
    with pytest.raises(AssertionError, match=r"staleness 2 .*the bound is 1"):
        run_all(TrajectoryBuffer, Scenario(StrictStaleness(1, 4), pace))
