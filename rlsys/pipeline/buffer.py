"""The trajectory buffer: the one place where rollout and learning meet.

A group passes it in this order, and leaves by exactly one of two ways:

    admit ──► put ──► take_batch ──► record_trained ──► release      (trained)
      └────────┴────► drop                                           (filtered, failed, cancelled)

It holds a slot from `admit` to `release` or `drop`. Which group may start and which are trained next is the rule of a
policy object (`rlsys.pipeline.staleness`); the buffer keeps the state, wakes who waits, and writes the ledger.

| call         | waits for              | until                                               | woken by               |
|--------------|------------------------|-----------------------------------------------------|------------------------|
| `admit`      | a free slot            | fewer than (S+1)·P groups hold one                  | `release`, `drop`      |
| `take_batch` | the P oldest groups    | all P are finished; a dropped one makes room for    | `put`, `admit`, `drop` |
|              | that are in no batch   | the next oldest                                     |                        |
| both         |                        | or the buffer is closed: they raise `BufferClosed`  | `close`                |

No other call waits.

Nothing waits in a circle: the oldest P groups always hold slots, so they finish or are dropped without waiting for the
buffer, the learner trains them without waiting for an admission, and that frees slots. What must go on outside: whoever
is admitted is put or dropped in the end, a dropped group's slot is asked for again, and `release` follows training.

Invariant: a problem that was drawn is in the buffer until its group has been trained or dropped; tickets count
admissions from 0 and give the order of training. One event loop, no threads: between two `await`s nothing changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlsys.errors import CheckpointError
from rlsys.pipeline.ledger import DropReason, Ledger
from rlsys.pipeline.staleness import StrictStaleness
from rlsys.types import Problem, TrajectoryGroup


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
    """Groups that are generated and scored, and not trained."""
    ledger: Mapping[str, Any]
    """`Ledger.snapshot()`."""


class TrajectoryBuffer:
    """Groups between admission and training. See the module for the waits."""

    def __init__(self, policy: StrictStaleness) -> None:
        self.ledger = Ledger()
        self._policy = policy
        self._next_ticket = 0
        self._in_flight: dict[int, Problem] = {}
        self._finished: dict[int, TrajectoryGroup] = {}
        self._in_training: dict[int, TrajectoryGroup] = {}
        self._awaiting_load: list[int] = []
        self._slot_freed = asyncio.Event()
        self._batch_changed = asyncio.Event()
        self._closed_because: str | None = None

    @property
    def capacity(self) -> int:
        """Slots in all: (S+1)·P."""
        return self._policy.required_capacity

    @property
    def num_held(self) -> int:
        """Slots taken: in flight, finished, in training, or trained with the weights not yet live on every worker."""
        return len(self._in_flight) + self.depth + len(self._in_training) + len(self._awaiting_load)

    @property
    def depth(self) -> int:
        """Finished groups that wait for the learner."""
        return len(self._finished)

    async def admit(self, draw: Callable[[], Problem]) -> Admission:
        """Take a slot, waiting for one, and draw the problem that is rolled out in it.

        `draw` is called at the moment the slot is taken, with no `await` between: a checkpoint never falls between a
        problem that has left the cursor and the buffer that answers for it.
        """
        while not self._policy.may_admit(self.num_held):
            await self._wait(self._slot_freed)
        self._assert_not_closed()
        problem = draw()
        ticket = self._next_ticket
        self._next_ticket += 1
        self.ledger.admit(ticket)
        self._in_flight[ticket] = problem
        self._batch_changed.set()
        return Admission(ticket, problem)

    def put(self, group: TrajectoryGroup) -> None:
        """Hand in a finished group; its slot was taken at admission, so there is always room."""
        self._end_flight(group.ticket)
        self.ledger.generate(group.ticket, group.generated_tokens)
        self._finished[group.ticket] = group
        self._batch_changed.set()

    def drop(self, ticket: int, reason: DropReason, tokens: int) -> None:
        """Give up a group in flight: its slot returns, and the `tokens` it had generated are counted as discarded."""
        self._end_flight(ticket)
        self.ledger.generate(ticket, tokens)
        self.ledger.drop(ticket, reason)
        self._slot_freed.set()
        self._batch_changed.set()

    async def take_batch(self, learner_version: int) -> list[TrajectoryGroup]:
        """Return the P oldest groups in order of admission, waiting until all of them are finished.

        `learner_version` is the version of the weights that will train on them; AssertionError where that would break
        the staleness bound.
        """
        while (tickets := self._policy.select(self._waiting(), self._finished)) is None:
            await self._wait(self._batch_changed)
        self._assert_not_closed()
        batch = [self._finished[ticket] for ticket in tickets]
        self._policy.check(batch, learner_version)
        for group in batch:
            self._in_training[group.ticket] = self._finished.pop(group.ticket)
        return batch

    def record_trained(self, trained_tokens: Mapping[int, int]) -> None:
        """Note that the optimizer step on a batch was made: from here on its groups are never trained again.

        `trained_tokens` gives for each ticket of the batch how many tokens counted in the loss. Call it directly after
        the step, with no `await` between, so that a checkpoint sees both or neither. The slots stay taken.
        """
        for ticket, trained in trained_tokens.items():
            assert ticket in self._in_training, f"group {ticket} is recorded as trained, but is not in training"
            masked = self._in_training.pop(ticket).generated_tokens - trained
            self.ledger.train(ticket, trained_tokens=trained, masked_tokens=masked)
            self._awaiting_load.append(ticket)

    def release(self, tickets: Sequence[int]) -> None:
        """Return the slots of trained groups: the weights trained on them are now live on every rollout worker."""
        for ticket in self._policy.release(self._awaiting_load, tickets):
            self._awaiting_load.remove(ticket)
        self._slot_freed.set()

    def close(self, reason: str) -> None:
        """Wake all who wait, with `BufferClosed(reason)`, and admit and hand out nothing from now on.

        Groups in flight can still be put or dropped, so that the last snapshot of a run holds them.
        """
        self._closed_because = reason
        self._slot_freed.set()
        self._batch_changed.set()

    def in_flight(self) -> list[Admission]:
        """Return the admissions that are neither put nor dropped; after `restore`: what must be rolled out again."""
        return [Admission(ticket, problem) for ticket, problem in sorted(self._in_flight.items())]

    def snapshot(self) -> BufferSnapshot:
        """Return what a checkpoint keeps.

        A batch in training counts as finished: the checkpoint holds the weights from before its step. Trained groups
        that wait for their weights to be live are left out: a resumed run loads its weights into every worker first.
        """
        return BufferSnapshot(
            next_ticket=self._next_ticket,
            in_flight=tuple(self.in_flight()),
            finished=tuple(group for _, group in sorted((self._in_training | self._finished).items())),
            ledger=self.ledger.snapshot(),
        )

    @classmethod
    def restore(cls, policy: StrictStaleness, snapshot: BufferSnapshot, learner_version: int) -> TrajectoryBuffer:
        """Return a buffer in the state of `snapshot`; the caller rolls out `in_flight()` again, without `admit`.

        `learner_version` is the version in the checkpoint, which must be live on every worker before anything is rolled
        out. Raises CheckpointError where the groups in the snapshot cannot meet the bound of `policy`, which was made
        stricter since.
        """
        buffer = cls(policy)
        buffer.ledger = Ledger.restore(snapshot.ledger)
        buffer._next_ticket = snapshot.next_ticket
        buffer._in_flight = dict(snapshot.in_flight)
        buffer._finished = {group.ticket: group for group in snapshot.finished}
        for place, ticket in enumerate(buffer._waiting()):
            group = buffer._finished.get(ticket)
            written_by = learner_version if group is None else group.first_version
            staleness = learner_version + place // policy.groups_per_step - written_by
            if staleness > policy.bound:
                raise CheckpointError(
                    f"the checkpoint holds group {ticket}, which this run would train at staleness {staleness}; its "
                    f"bound is {policy.bound} with {policy.groups_per_step} groups per step.\n"
                    f"Resume with the staleness bound and groups per step of the run that wrote the checkpoint."
                )
        return buffer

    def _waiting(self) -> list[int]:
        """Tickets that hold a slot and are in no batch yet, oldest first."""
        return sorted([*self._in_flight, *self._finished])

    def _end_flight(self, ticket: int) -> None:
        assert ticket in self._in_flight, f"group {ticket} is not in flight: never admitted, or already put or dropped"
        del self._in_flight[ticket]

    async def _wait(self, changed: asyncio.Event) -> None:
        """Wait for the next change after now; whoever wakes asks its question again."""
        self._assert_not_closed()
        changed.clear()
        await changed.wait()

    def _assert_not_closed(self) -> None:
        if self._closed_because is not None:
            raise BufferClosed(self._closed_because)
