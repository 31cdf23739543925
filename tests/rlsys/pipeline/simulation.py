"""A run in miniature round the real buffer: workers of unequal speed that die and come back, a learner, loads that
overlap the next step.

It keeps its own `Books` beside the buffer's ledger, and `tests.rlsys.pipeline.laws` compares the two. What becomes of a
group (how long each attempt takes, whether it is dropped) depends on seed and ticket, not on the order of events.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from rlsys.pipeline.buffer import Admission, TrajectoryBuffer
from rlsys.pipeline.ledger import DropReason
from rlsys.pipeline.staleness import EvictStaleness, StalenessPolicy
from rlsys.types import Problem, TrajectoryGroup
from tests.rlsys.groups import make_group, make_problem, make_trajectory


@dataclass(frozen=True)
class Pace:
    """How long things take, how often they go wrong, and how the learner takes its groups."""

    learn_seconds: float = 1.0
    load_seconds: float = 0.5
    group_seconds: float = 1.0
    """Median; durations are log-normal with sigma 1.5 (a mean of 3 medians, one in a hundred above 30), or 0."""
    groups_at_once: int = 5
    """For each worker; more of them wait."""
    drop_rate: float = 0.0
    seconds_between_losses: float | None = None
    """Mean, for each worker; it stays away for a tenth of that."""
    roll_out_again: bool = False
    """What becomes of a lost worker's groups; else they are dropped as cancelled."""
    streaming: bool = False
    release_before_load: bool = False
    returns_outdated: bool = False
    """Two defects: slots that are free too early, and a worker that comes back with the weights it died with."""


@dataclass
class Books:
    """What the simulation itself saw; a crash takes the books back to the last checkpoint, as it takes the buffer."""

    version: int = 0
    drawn: int = 0
    batches: list[list[int]] = field(default_factory=list[list[int]])
    staleness: list[int] = field(default_factory=list[int])
    dropped: list[int] = field(default_factory=list[int])
    problems: dict[int, str] = field(default_factory=dict[int, str])
    first_versions: dict[int, int] = field(default_factory=dict[int, int])
    """Of the groups that were put."""
    tokens: dict[int, int] = field(default_factory=dict[int, int])
    """Of the groups that were put or dropped."""
    evicted_at: dict[int, int] = field(default_factory=dict[int, int])
    """The learner's version when the buffer threw the group away."""
    most_held: int = 0
    learner_waited: float = 0.0

    @property
    def trained(self) -> list[int]:
        return [ticket for batch in self.batches for ticket in batch]


class _Worker:
    def __init__(self, version: int, speed: float, groups_at_once: int) -> None:
        self.live = version
        self.speed = speed
        self.free = asyncio.Semaphore(groups_at_once)
        self.deaths = 0
        self.up = asyncio.Event()
        self.up.set()


class Simulation:
    """The two loops of a controller over one buffer."""

    def __init__(
        self,
        buffer: TrajectoryBuffer,
        policy: StalenessPolicy,
        pace: Pace,
        seed: int,
        books: Books | None = None,
        on_event: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_event` is called after each call of the buffer, when the books hold what it did."""
        self.buffer = buffer
        self.books = Books() if books is None else books
        self._policy = policy
        self._pace = pace
        self._seed = seed
        self._on_event = on_event
        self._slots = {ticket for ticket in self.books.problems if ticket in buffer}
        self._published = self.books.version
        self._workers = [_Worker(self._published, speed, pace.groups_at_once) for speed in (1.0, 0.4)]
        self._flights: set[asyncio.Task[None]] = set()

    async def run(self, steps: int) -> Books:
        """Train `steps` batches."""
        rolling = asyncio.create_task(self._roll_out())
        losing = [asyncio.create_task(self._lose(worker)) for worker in range(2)]
        loading = asyncio.create_task(asyncio.sleep(0))
        for _ in range(steps):
            batch = await self._learn()
            tickets = [group.ticket for group in batch]
            self.books.version += 1
            self.buffer.record_trained({group.ticket: group.generated_tokens - 1 for group in batch})
            self.books.batches.append(tickets)
            if isinstance(self._policy, EvictStaleness):
                self._slots -= set(tickets)
            self._on_event()
            self.buffer.ledger.check()
            await loading
            loading = asyncio.create_task(self._load(self.books.version, tickets))
        await loading
        for task in (rolling, *losing):
            task.cancel()
        self._raise_failures()
        return self.books

    # ------------------------------------------------------------ learn

    async def _learn(self) -> list[TrajectoryGroup]:
        """Take a batch and train on it, in one go or group by group as they come."""
        batch: list[TrajectoryGroup] = []
        loop, groups_per_step = asyncio.get_running_loop(), self._policy.groups_per_step
        while len(batch) < groups_per_step:
            asked = loop.time()
            take = self.buffer.take_next if self._pace.streaming else self.buffer.take_batch
            groups = await take(self.books.version)
            self.books.learner_waited += loop.time() - asked
            self.books.staleness += [
                self.books.version - self.books.first_versions[group.ticket] for group in groups
            ]  # fmt: skip
            batch += groups
            self._note_evicted({group.ticket for group in batch})
            self._on_event()
            await asyncio.sleep(self._pace.learn_seconds * len(groups) / groups_per_step)
        return batch

    def _note_evicted(self, in_training: set[int]) -> None:
        """Groups that were put and are gone, though nobody trains them: thrown away while the learner took."""
        gone = {ticket for ticket in self.books.first_versions if ticket not in self.buffer}
        for ticket in gone - in_training - set(self.books.trained) - self.books.evicted_at.keys():
            self.books.evicted_at[ticket] = self.books.version

    async def _load(self, version: int, tickets: list[int]) -> None:
        self._published = version
        if self._pace.release_before_load:
            self._release(tickets)
        for worker in self._workers:
            await asyncio.sleep(self._pace.load_seconds)
            if worker.up.is_set():
                worker.live = version
        if not self._pace.release_before_load:
            self._release(tickets)

    def _release(self, tickets: list[int]) -> None:
        self.buffer.release(tickets)
        self._slots -= set(tickets)
        self._on_event()

    # ------------------------------------------------------------ roll out

    async def _roll_out(self) -> None:
        for admission in self.buffer.in_flight():
            self._take_off(admission)
        while True:
            admission = await self.buffer.admit(self._draw)
            self._slots = {ticket for ticket in self._slots if not self._was_evicted(ticket)} | {admission.ticket}
            self.books.most_held = max(self.books.most_held, len(self._slots))
            self._take_off(admission)
            self._on_event()

    def _draw(self) -> Problem:
        self.books.drawn += 1
        return make_problem(self.books.drawn - 1)

    def _was_evicted(self, ticket: int) -> bool:
        evicts = isinstance(self._policy, EvictStaleness)
        return evicts and ticket in self.books.first_versions and ticket not in self.buffer

    def _take_off(self, admission: Admission) -> None:
        self.books.problems[admission.ticket] = admission.problem.problem_id
        self._flights.add(asyncio.create_task(self._roll_out_group(admission)))

    async def _roll_out_group(self, admission: Admission) -> None:
        chance = random.Random(f"{self._seed}/{admission.ticket}")
        while True:
            worker = self._workers[chance.randrange(2)]
            async with worker.free:
                await worker.up.wait()
                begun_by, deaths = worker.live, worker.deaths
                seconds = self._pace.group_seconds * chance.lognormvariate(0.0, 1.5) / worker.speed
                await asyncio.sleep(seconds)
                ended_by, lost = worker.live, worker.deaths > deaths
            if not lost:
                break
            if not self._pace.roll_out_again:
                self._drop(admission.ticket, DropReason.CANCELLED, tokens=2)
                return
        slow = make_trajectory([(begun_by, 1), (ended_by, 2 + min(int(seconds), 60))])
        group = make_group(admission.ticket, [make_trajectory([(begun_by, 2)]), slow], admission.problem)
        if chance.random() < self._pace.drop_rate:
            self._drop(group.ticket, chance.choice([DropReason.FILTERED, DropReason.FAILED]), group.generated_tokens)
        else:
            self.books.first_versions[group.ticket] = begun_by
            self.books.tokens[group.ticket] = group.generated_tokens
            self.buffer.put(group)
            self._on_event()

    def _drop(self, ticket: int, reason: DropReason, tokens: int) -> None:
        self.buffer.drop(ticket, reason, tokens)
        self._slots.discard(ticket)
        self.books.dropped.append(ticket)
        self.books.tokens[ticket] = tokens
        self._on_event()

    async def _lose(self, number: int) -> None:
        """Kill a worker again and again; it comes back with the weights that were published last."""
        if self._pace.seconds_between_losses is None:
            return
        worker, chance = self._workers[number], random.Random(f"{self._seed}/worker {number}")
        while True:
            await asyncio.sleep(chance.expovariate(1 / self._pace.seconds_between_losses))
            worker.deaths += 1
            worker.up.clear()
            await asyncio.sleep(self._pace.seconds_between_losses / 10)
            if not self._pace.returns_outdated:
                worker.live = self._published
            worker.up.set()

    def _raise_failures(self) -> None:
        for flight in self._flights:
            if flight.done() and not flight.cancelled():
                flight.result()
