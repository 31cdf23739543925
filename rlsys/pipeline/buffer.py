"""The trajectory buffer: the one place where rollout and learning meet.

A group passes it in this order, and leaves by exactly one of two ways:

    admit ──► put ──► take_batch, or take_next until the batch is full ──► record_trained ──► release    (trained)
      └────────┴────► drop                                               (filtered, failed, cancelled, stale)

It holds a slot from `admit` on, until it is dropped, or trained and given back by the policy object (mostly at
`release`). Which group may start and which are trained next is the policy's rule (`rlsys.pipeline.staleness`); the
buffer keeps the state, wakes who waits, and writes the ledger.

| call         | waits for           | until                                   | woken by                            |
|--------------|---------------------|-----------------------------------------|-------------------------------------|
| `admit`      | a free slot         | the policy admits one more              | `release`, `drop`, `record_trained` |
| `take_batch` | a whole batch       | the policy selects P finished groups    | `put`, `admit`, `drop`              |
| `take_next`  | the next of a batch | it selects as many as are asked for     | `put`, `admit`, `drop`              |
| all three    |                     | or the buffer is closed: `BufferClosed` | `close`                             |
|              |                     | or the deadline has passed: `RoleError` | the clock                           |

No other call waits.

Nothing waits in a circle: groups finish or are dropped without waiting for the buffer, the learner trains what is
selected without waiting for an admission, that frees slots, and where all slots wait finished a batch can be selected
(the policies say why). What must go on outside: whoever is admitted is put or dropped in the end, a dropped group's
slot is asked for again, and `release` follows training.

Invariant: a problem that was drawn is in the buffer until its group has been trained or dropped; tickets count
admissions from 0. One event loop, no threads: between two `await`s nothing changes.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from rlsys.errors import CheckpointError
from rlsys.pipeline.ledger import DropReason, Ledger
from rlsys.pipeline.staleness import StalenessPolicy
from rlsys.pipeline.waits import Role, within
from rlsys.types import Problem, TrajectoryGroup

T = TypeVar("T")


class Admission(NamedTuple):
    """A slot, and the problem to be rolled out in it."""

    ticket: int
    """Number of the group in order of admission; it becomes `TrajectoryGroup.ticket`."""
    problem: Problem


class BufferClosed(Exception):  # noqa: N818  closing is how a run ends, not an error
    """The buffer was closed while somebody waited, or before; the message says why."""


@dataclass(frozen=True)
class BufferSnapshot:
    """What a checkpoint keeps of the buffer: plain data that can be pickled."""

    next_ticket: int
    in_flight: tuple[Admission, ...]
    """Groups under way; their completions are lost, their problems are rolled out again under the same tickets."""
    finished: tuple[TrajectoryGroup, ...]
    """Groups that are generated and scored, and not trained, in order of finishing."""
    passers: tuple[int, ...]
    """Tickets of trained groups that are younger than one that is in the snapshot, ascending."""
    ledger: Mapping[str, Any]
    """`Ledger.snapshot()`."""


class TrajectoryBuffer:
    """Groups between admission and training. See the module for the waits.

    A wait that lasts longer than `deadline_seconds` (None: none is too long) ends with a RoleError that says who waited
    for what, and what the buffer held.
    """

    def __init__(self, policy: StalenessPolicy, *, deadline_seconds: float | None = None) -> None:
        self.ledger = Ledger()
        self._policy = policy
        self._deadline_seconds = deadline_seconds
        self._next_ticket = 0
        self._waiting: dict[int, Problem] = {}
        """In flight or finished, in order of admission."""
        self._finished: dict[int, TrajectoryGroup] = {}
        """In order of finishing."""
        self._in_training: dict[int, TrajectoryGroup] = {}
        """The open batch: what was taken of it so far."""
        self._awaiting_load: list[int] = []
        """Trained groups that still hold a slot, in order of training."""
        self._passers: list[int] = []
        """Groups taken, ascending; those that are older than all that wait are forgotten when a batch is closed."""
        self._slot_freed = asyncio.Event()
        self._batch_changed = asyncio.Event()
        self._closed_because: str | None = None

    @property
    def capacity(self) -> int:
        """Slots in all."""
        return self._policy.required_capacity

    @property
    def num_held(self) -> int:
        """Slots taken: in flight, finished, in training, or trained and not given back by the policy."""
        return len(self._waiting) + len(self._in_training) + len(self._awaiting_load)

    @property
    def depth(self) -> int:
        """Finished groups that wait for the learner."""
        return len(self._finished)

    def __contains__(self, ticket: int) -> bool:
        """Whether group `ticket` may still be trained: it is in flight, finished or in training."""
        return ticket in self._waiting or ticket in self._in_training

    async def admit(self, draw: Callable[[], Problem]) -> Admission:
        """Take a slot, waiting for one, and draw the problem that is rolled out in it.

        `draw` is called at the moment the slot is taken, with no `await` between: a checkpoint never falls between a
        problem that has left the cursor and the buffer that answers for it.
        """
        await self._until(self._may_admit, self._slot_freed, Role.ROLLOUT_WORKER, "admit (waiting for a slot)")
        problem = draw()
        ticket = self._next_ticket
        self._next_ticket += 1
        self.ledger.admit(ticket)
        self._waiting[ticket] = problem
        self._batch_changed.set()
        return Admission(ticket, problem)

    def put(self, group: TrajectoryGroup) -> None:
        """Hand in a finished group; its slot was taken at admission, so there is always room."""
        self._assert_in_flight(group.ticket)
        self.ledger.generate(group.ticket, group.generated_tokens)
        self._finished[group.ticket] = group
        self._batch_changed.set()

    def drop(self, ticket: int, reason: DropReason, tokens: int) -> None:
        """Give up a group in flight: its slot returns, and the `tokens` it had generated are counted as discarded."""
        self._assert_in_flight(ticket)
        self.ledger.generate(ticket, tokens)
        self._end(ticket, reason)

    async def take_batch(self, learner_version: int) -> list[TrajectoryGroup]:
        """Return the P groups of the next batch in the policy's order, waiting until it selects that many.

        `learner_version` is the version of the weights that will train on them; AssertionError where that would break
        the staleness bound.
        """
        assert not self._in_training, "a batch is begun: record_trained closes it"
        return await self._take(learner_version, at_least=self._policy.groups_per_step, call="take_batch")

    async def take_next(self, learner_version: int, at_least: int = 1) -> list[TrajectoryGroup]:
        """Return the groups that are now certain to be in the current batch, waiting for `at_least`, or for all that
        are left of it where these are fewer.

        The calls of one batch return P groups in all; `record_trained` closes it. With the strict policy it is the
        same batch that `take_batch` returns: the P oldest groups that are not dropped. A group that is returned is one
        of the oldest for which there is room, and nothing that comes later is older. The other policies choose by what
        is finished at each call, so they take other groups where they are asked earlier; their bound is the same.
        """
        left = self._policy.groups_per_step - len(self._in_training)
        return await self._take(learner_version, at_least=min(at_least, left), call="take_next")

    def record_trained(self, trained_tokens: Mapping[int, int]) -> None:
        """Note that the optimizer step on a batch was made: from here on its groups are never trained again.

        `trained_tokens` gives for each ticket of the batch how many tokens counted in the loss. Call it directly after
        the step, with no `await` between, so that a checkpoint sees both or neither. Most policies keep the slots.
        """
        assert trained_tokens.keys() == self._in_training.keys(), (
            f"groups {sorted(trained_tokens)} are recorded as trained, but {sorted(self._in_training)} are in training"
        )
        for ticket, trained in trained_tokens.items():
            masked = self._in_training.pop(ticket).generated_tokens - trained
            self.ledger.train(ticket, trained_tokens=trained, masked_tokens=masked)
            self._awaiting_load.append(ticket)
        oldest_waiting = next(iter(self._waiting), self._next_ticket)
        del self._passers[: bisect_left(self._passers, oldest_waiting)]
        self._free_slots(live=())

    def release(self, tickets: Sequence[int]) -> None:
        """Note that the weights trained on these groups are now live on every rollout worker; frees their slots."""
        self._free_slots(live=tickets)

    def close(self, reason: str) -> None:
        """Wake all who wait, with `BufferClosed(reason)`, and admit and hand out nothing from now on.

        Groups in flight can still be put or dropped, so that the last snapshot of a run holds them.
        """
        self._closed_because = reason
        self._slot_freed.set()
        self._batch_changed.set()

    def in_flight(self) -> list[Admission]:
        """Return the admissions that are neither put nor dropped; after `restore`: what must be rolled out again."""
        return [Admission(*waiting) for waiting in self._waiting.items() if waiting[0] not in self._finished]

    def finished(self) -> list[TrajectoryGroup]:
        """Return the groups that wait for the learner, in order of finishing."""
        return list(self._finished.values())

    def snapshot(self) -> BufferSnapshot:
        """Return what a checkpoint keeps.

        What was taken of a batch counts as finished: the checkpoint holds the weights from before its step. Trained
        groups that wait for their weights to be live are left out: a resumed run loads its weights into every worker
        first.
        """
        return BufferSnapshot(
            next_ticket=self._next_ticket,
            in_flight=tuple(self.in_flight()),
            finished=(*self._in_training.values(), *self._finished.values()),
            passers=tuple(ticket for ticket in self._passers if ticket not in self._in_training),
            ledger=self.ledger.snapshot(),
        )

    @classmethod
    def restore(
        cls,
        policy: StalenessPolicy,
        snapshot: BufferSnapshot,
        learner_version: int,
        *,
        deadline_seconds: float | None = None,
    ) -> TrajectoryBuffer:
        """Return a buffer in the state of `snapshot`; the caller rolls out `in_flight()` again, without `admit`.

        `learner_version` is the version in the checkpoint, which must be live on every worker before anything is rolled
        out. Raises CheckpointError where the groups in the snapshot cannot meet the bound of `policy`, which was made
        stricter since.
        """
        buffer = cls(policy, deadline_seconds=deadline_seconds)
        buffer.ledger = Ledger.restore(snapshot.ledger)
        buffer._next_ticket = snapshot.next_ticket
        buffer._finished = {group.ticket: group for group in snapshot.finished}
        buffer._waiting = dict(
            sorted([*snapshot.in_flight, *((group.ticket, group.problem) for group in snapshot.finished)])
        )
        buffer._passers = list(snapshot.passers)
        for place, ticket in enumerate(buffer._waiting):
            group = buffer._finished.get(ticket)
            now = 0 if group is None else learner_version - group.first_version
            staleness = policy.worst_staleness(now, place, buffer._passed(ticket))
            if staleness > policy.bound:
                raise CheckpointError(
                    f"the checkpoint holds group {ticket}, which this run would train at staleness {staleness}; its "
                    f"bound is {policy.bound} with {policy.groups_per_step} groups per step.\n"
                    f"Resume with the staleness bound, order and groups per step of the run that wrote the checkpoint."
                )
        return buffer

    async def _take(self, learner_version: int, *, at_least: int, call: str) -> list[TrajectoryGroup]:
        room = self._policy.groups_per_step - len(self._in_training)
        assert room > 0, "the batch is full: record_trained closes it"

        def select() -> tuple[int, ...] | None:
            for ticket in self._policy.evict(self._finished.values(), learner_version):
                del self._finished[ticket]
                self._end(ticket, DropReason.STALE)
            tickets = self._policy.select(self._waiting, self._finished, room, self._passed)
            return tickets if len(tickets) >= at_least else None

        wanted = f"{call} (waiting for {at_least} of the {room} groups that version {learner_version} still trains on)"
        tickets = await self._until(select, self._batch_changed, Role.LEARNER, wanted)
        groups = [self._finished[ticket] for ticket in tickets]
        self._policy.check(groups, learner_version)
        for group in groups:
            del self._waiting[group.ticket]
            self._in_training[group.ticket] = self._finished.pop(group.ticket)
            insort(self._passers, group.ticket)
        return groups

    def _may_admit(self) -> bool | None:
        return self._policy.admit(self.num_held) or None

    def _passed(self, ticket: int) -> int:
        """Groups younger than `ticket` that were taken; exact for all that wait."""
        return len(self._passers) - bisect_right(self._passers, ticket)

    def _end(self, ticket: int, reason: DropReason) -> None:
        del self._waiting[ticket]
        self.ledger.drop(ticket, reason)
        self._slot_freed.set()
        self._batch_changed.set()

    def _free_slots(self, live: Sequence[int]) -> None:
        for ticket in self._policy.release(self._awaiting_load, live):
            self._awaiting_load.remove(ticket)
        self._slot_freed.set()

    async def _until(self, ready: Callable[[], T | None], changed: asyncio.Event, role: Role, call: str) -> T:
        """Return what `ready` returns as soon as that is not None, asking again at every change.

        Nothing happens between the last question and the return, so what was true then is true for the caller.
        """

        async def ask() -> T:
            while True:
                changed.clear()
                await changed.wait()
                self._assert_not_closed()
                if (answer := ready()) is not None:
                    return answer

        self._assert_not_closed()
        if (answer := ready()) is not None:
            return answer
        return await within(self._deadline_seconds, ask(), role=role, call=call, state=self._state)

    def _state(self) -> str:
        in_flight = [admission.ticket for admission in self.in_flight()]
        return (
            f"the buffer holds {len(in_flight)} groups in flight (the oldest is {min(in_flight, default='none')}), "
            f"{self.depth} finished, {len(self._in_training)} in training and {len(self._awaiting_load)} trained whose "
            f"weights are not live; it has {self.capacity} slots"
        )

    def _assert_in_flight(self, ticket: int) -> None:
        is_in_flight = ticket in self._waiting and ticket not in self._finished
        assert is_in_flight, f"group {ticket} is not in flight: never admitted, or already put or dropped"

    def _assert_not_closed(self) -> None:
        if self._closed_because is not None:
            raise BufferClosed(self._closed_because)
