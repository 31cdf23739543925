"""A run that is killed at any event and goes on from its last checkpoint: nothing lost, nothing trained twice."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.errors import CheckpointError
from rlsys.pipeline.buffer import BufferSnapshot, TrajectoryBuffer
from rlsys.pipeline.ledger import Ledger
from rlsys.pipeline.staleness import StalenessPolicy
from rlsys.types import TrajectoryGroup
from tests.rlsys.pipeline.laws import check_laws
from tests.rlsys.pipeline.policies import UncheckedStrict, UncheckedWindowed, policies
from tests.rlsys.pipeline.simulation import Books, Pace, Simulation
from tests.rlsys.pipeline.test_buffer_laws import ANY_PACE, SEEDS
from tests.rlsys.virtual_time import run_virtual


@dataclass(frozen=True)
class Crash:
    """The last checkpoint is written after so many events of a sitting, and so many later the run is killed."""

    checkpoint_after: int
    killed_after: int


CRASHES = st.lists(st.builds(Crash, st.integers(1, 120), st.integers(0, 40)), max_size=3)


def run_sitting(
    buffer_type: type[TrajectoryBuffer],
    policy: StalenessPolicy,
    pace: Pace,
    seed: int,
    checkpoint: bytes,
    crash: Crash | None,
) -> bytes:
    """Go on from a checkpoint, and return the next: at `crash`, or else after 6 steps whose end keeps the laws."""

    async def run() -> bytes:
        loop, killed = asyncio.get_running_loop(), asyncio.Event()
        snapshot, books = pickle.loads(checkpoint)
        buffer = buffer_type(policy)
        if snapshot is not None:
            buffer = buffer_type.restore(policy, snapshot, books.version)
        events, written = 0, checkpoint

        def on_event() -> None:
            nonlocal events, written
            events += 1
            if crash is not None and events == crash.checkpoint_after:
                written = pickle.dumps((buffer.snapshot(), books))
            if crash is not None and events == crash.checkpoint_after + crash.killed_after:
                killed.set()

        simulation = Simulation(buffer, policy, pace, seed, books, on_event)
        running, killing = loop.create_task(simulation.run(6)), loop.create_task(killed.wait())
        await asyncio.wait([running, killing], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        if crash is None:
            check_laws(buffer, books, policy)
            return pickle.dumps((buffer.snapshot(), books))
        return written

    return run_virtual(run())


def run_with_crashes(
    buffer_type: type[TrajectoryBuffer], policy: StalenessPolicy, pace: Pace, seed: int, crashes: list[Crash]
) -> None:
    """Each sitting has other durations; the laws are checked after the last, over the books of all."""
    checkpoint = pickle.dumps((None, Books()))
    for sitting, crash in enumerate([*crashes, None]):
        checkpoint = run_sitting(buffer_type, policy, pace, seed + sitting, checkpoint, crash)


@settings(deadline=None, max_examples=80)
@given(policy=policies(), pace=ANY_PACE, seed=SEEDS, crashes=CRASHES)
def test_a_run_killed_at_any_event_goes_on_without_losing_or_repeating_a_group(
    policy: StalenessPolicy, pace: Pace, seed: int, crashes: list[Crash]
) -> None:
    run_with_crashes(TrajectoryBuffer, policy, pace, seed, crashes)


class ForgetsWhatIsInTraining(TrajectoryBuffer):
    def snapshot(self) -> BufferSnapshot:
        return replace(super().snapshot(), finished=tuple(self._finished.values()))


class ForgetsWhatIsFinished(TrajectoryBuffer):
    def snapshot(self) -> BufferSnapshot:
        return replace(super().snapshot(), finished=tuple(self._in_training.values()))


class ForgetsWhatIsInFlight(TrajectoryBuffer):
    def snapshot(self) -> BufferSnapshot:
        return replace(super().snapshot(), in_flight=())


class ForgetsWhoPassed(TrajectoryBuffer):
    def snapshot(self) -> BufferSnapshot:
        return replace(super().snapshot(), passers=())


class ForgetsTheTicketsGivenOut(TrajectoryBuffer):
    def snapshot(self) -> BufferSnapshot:
        return replace(super().snapshot(), next_ticket=max(self._waiting, default=0))


class ForgetsTheLedger(TrajectoryBuffer):
    def snapshot(self) -> BufferSnapshot:
        return replace(super().snapshot(), ledger=Ledger().snapshot())


class KeepsTrainedGroups(TrajectoryBuffer):
    trained: tuple[TrajectoryGroup, ...] = ()

    def record_trained(self, trained_tokens: Mapping[int, int]) -> None:
        self.trained = tuple(self._in_training.values())
        super().record_trained(trained_tokens)

    def snapshot(self) -> BufferSnapshot:
        snapshot = super().snapshot()
        return replace(snapshot, finished=(*self.trained, *snapshot.finished))


SNAPSHOT_DEFECTS = [
    ForgetsWhatIsInTraining,
    ForgetsWhatIsFinished,
    ForgetsWhatIsInFlight,
    ForgetsWhoPassed,
    ForgetsTheTicketsGivenOut,
    ForgetsTheLedger,
    KeepsTrainedGroups,
]
SCENARIOS = [
    (UncheckedStrict(2, 4), Pace(learn_seconds=2.0, drop_rate=0.2, streaming=True)),
    (UncheckedWindowed(2, 4, window=4), Pace(learn_seconds=4.0, groups_at_once=40)),
]


def run_scenarios(buffer_type: type[TrajectoryBuffer]) -> None:
    for policy, pace in SCENARIOS:
        for seed in range(12):
            crashes = [Crash(checkpoint_after, 5) for checkpoint_after in (40 + seed, 60 - seed)]
            run_with_crashes(buffer_type, policy, pace, seed, crashes)


@pytest.mark.parametrize("defect", SNAPSHOT_DEFECTS)
def test_a_checkpoint_that_forgets_something_is_caught(defect: type[TrajectoryBuffer]) -> None:
    run_scenarios(TrajectoryBuffer)
    with pytest.raises((AssertionError, CheckpointError)):
        run_scenarios(defect)
