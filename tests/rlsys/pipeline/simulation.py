"""A run in miniature round the real buffer: workers of unequal speed, a learner, loads that overlap the next step.

It keeps its own books (`Outcome`) beside the buffer's, and `check_laws` compares the two.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from rlsys.pipeline.buffer import Admission, TrajectoryBuffer
from rlsys.pipeline.ledger import DropReason
from rlsys.pipeline.staleness import StrictStaleness
from rlsys.types import Problem, TrajectoryGroup
from tests.rlsys.groups import make_group, make_problem, make_trajectory
from tests.rlsys.virtual_time import run_virtual


@dataclass(frozen=True)
class Pace:
    """How long things take, and how often a group is dropped."""

    learn_seconds: float = 1.0
    load_seconds: float = 0.5
    group_seconds: float = 1.0
    """Median; durations are log-normal with sigma 1.5 (a mean of 3 medians, one in a hundred above 30), or 0."""
    drop_rate: float = 0.0
    release_before_load: bool = False


@dataclass
class Outcome:
    """What the simulation itself saw."""

    batches: list[list[int]] = field(default_factory=list[list[int]])
    staleness: list[int] = field(default_factory=list[int])
    dropped: list[int] = field(default_factory=list[int])
    generated_tokens: int = 0
    most_held: int = 0
    problems: dict[int, str] = field(default_factory=dict[int, str])


class Simulation:
    """The two loops of a controller over one buffer."""

    def __init__(self, buffer: TrajectoryBuffer, pace: Pace, seed: int, *, version: int = 0, drawn: int = 0) -> None:
        self.buffer = buffer
        self.version = version
        self.drawn = drawn
        self.outcome = Outcome()
        self._pace = pace
        self._random = random.Random(seed)
        self._live = [version, version]
        self._speed = [1.0, 0.4]
        self._free = [asyncio.Semaphore(5), asyncio.Semaphore(5)]
        self._flights: set[asyncio.Task[None]] = set()

    async def run(self, steps: int) -> Outcome:
        """Train `steps` batches."""
        rolling = asyncio.create_task(self._roll_out())
        loading = asyncio.create_task(asyncio.sleep(0))
        for _ in range(steps):
            batch = await self.buffer.take_batch(self.version)
            self.outcome.batches.append([group.ticket for group in batch])
            self.outcome.staleness += [self.version - self._first_version(group) for group in batch]
            await asyncio.sleep(self._pace.learn_seconds)
            self.version += 1
            self.buffer.record_trained({group.ticket: group.generated_tokens - 1 for group in batch})
            self.buffer.ledger.check()
            await loading
            loading = asyncio.create_task(self._load(self.version, [group.ticket for group in batch]))
        await loading
        rolling.cancel()
        self._raise_failures()
        return self.outcome

    @staticmethod
    def _first_version(group: TrajectoryGroup) -> int:
        return min(one.completion.version_spans[0].version for one in group.trajectories)

    def _draw(self) -> Problem:
        self.drawn += 1
        return make_problem(self.drawn - 1)

    async def _roll_out(self) -> None:
        for admission in self.buffer.in_flight():
            self._take_off(admission)
        while True:
            self._take_off(await self.buffer.admit(self._draw))
            self.outcome.most_held = max(self.outcome.most_held, self.buffer.num_held)

    def _take_off(self, admission: Admission) -> None:
        self.outcome.problems[admission.ticket] = admission.problem.problem_id
        self._flights.add(asyncio.create_task(self._roll_out_group(admission)))

    async def _roll_out_group(self, admission: Admission) -> None:
        worker = self._random.randrange(2)
        async with self._free[worker]:
            begun_by = self._live[worker]
            seconds = self._pace.group_seconds * self._random.lognormvariate(0.0, 1.5) / self._speed[worker]
            await asyncio.sleep(seconds)
            ended_by = self._live[worker]
        fast, slow = make_trajectory([(begun_by, 2)]), make_trajectory([(begun_by, 1), (ended_by, 2)])
        group = make_group(admission.ticket, [fast, slow], admission.problem)
        self.outcome.generated_tokens += 5
        if self._random.random() < self._pace.drop_rate:
            self.outcome.dropped.append(group.ticket)
            self.buffer.drop(group.ticket, self._random.choice(list(DropReason)), group.generated_tokens)
        else:
            self.buffer.put(group)

    async def _load(self, version: int, tickets: list[int]) -> None:
        if self._pace.release_before_load:
            self.buffer.release(tickets)
        for worker in range(2):
            await asyncio.sleep(self._pace.load_seconds)
            self._live[worker] = version
        if not self._pace.release_before_load:
            self.buffer.release(tickets)

    def _raise_failures(self) -> None:
        for flight in self._flights:
            if flight.done() and not flight.cancelled():
                flight.result()


def check_laws(buffer: TrajectoryBuffer, outcome: Outcome, *, bound: int, groups_per_step: int) -> None:
    """Raise AssertionError where the run broke a law of the buffer."""
    assert max(outcome.staleness) <= bound, f"trained at staleness {max(outcome.staleness)}"
    assert all(len(batch) == groups_per_step for batch in outcome.batches)
    trained = [ticket for batch in outcome.batches for ticket in batch]
    assert trained == sorted(set(trained)), "trained out of order, or twice"
    skipped = set(range(trained[0], trained[-1])) - set(trained)
    assert skipped <= set(outcome.dropped), f"groups {sorted(skipped - set(outcome.dropped))} were passed by"
    assert outcome.most_held <= (bound + 1) * groups_per_step, f"{outcome.most_held} slots were taken at once"
    buffer.ledger.check()
    counts = buffer.ledger.counts()
    assert buffer.num_held == counts.groups_in_flight, "a slot was lost, or freed twice"
    assert counts.tokens_generated == outcome.generated_tokens
    assert counts.tokens_trained == (5 - 1) * len(trained)
    assert counts.tokens_masked == len(trained)
    assert sum(counts.groups_dropped.values()) == len(outcome.dropped)
    assert all(problem == str(ticket) for ticket, problem in outcome.problems.items())


def run_checked(
    buffer_type: type[TrajectoryBuffer], policy: StrictStaleness, pace: Pace, seed: int, steps: int
) -> Outcome:
    """Run a simulation under virtual time and check the laws for the bound and the batch size of `policy`."""

    async def run() -> Outcome:
        buffer = buffer_type(policy)
        outcome = await Simulation(buffer, pace, seed).run(steps)
        check_laws(buffer, outcome, bound=policy.bound, groups_per_step=policy.groups_per_step)
        return outcome

    return run_virtual(run())
