"""How stale a group may be when it is trained: the rules that the trajectory buffer asks at every turn.

The staleness of a group is the learner's version when it is used minus the version that wrote its oldest first token.
Batch b is trained at version b and makes version b+1. Three policies keep it at or below a bound S, with batches of P:

| policy              | slots       | a slot is free again        | trained first           | thrown away for age |
|---------------------|-------------|-----------------------------|-------------------------|---------------------|
| `StrictStaleness`   | (S+1)·P     | when the weights are live   | the oldest              | nothing             |
| `WindowedStaleness` | (S+1)·P - W | when the weights are live   | the oldest finished,    | nothing             |
|                     |             |                             | W may pass a slow group |                     |
| `EvictStaleness`    | (S+1)·P     | when the step is made       | the first to finish     | what is over S      |

A policy holds no state: the buffer tells it what it asks about, so that one object serves a run, a resumed run and a
simulation alike.

Invariant: no group is trained at a staleness over S. The proofs for the first two are in their docstrings; the third
looks at each group before it is used. All three assert it once more at that moment (`check`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

from rlsys.config_grpo import EvictOrder, Order, StrictOrder, WindowedOrder
from rlsys.types import TrajectoryGroup


class GroupStaleness(NamedTuple):
    """Policy versions between the writing of a group and its training; `total = in_flight + in_queue`."""

    total: int
    """The learner's version when the group is used, minus the group's oldest first version."""
    in_flight: int
    """Versions that went live while the group was being generated."""
    in_queue: int
    """Versions made between its last token and its training."""


def group_staleness(group: TrajectoryGroup, learner_version: int) -> GroupStaleness:
    """Return how stale `group` is for a learner whose weights are `learner_version`."""
    return GroupStaleness(
        total=learner_version - group.first_version,
        in_flight=group.last_version - group.first_version,
        in_queue=learner_version - group.last_version,
    )


class StalenessPolicy(Protocol):
    """What the buffer asks. Groups are named by their tickets, which count admissions."""

    @property
    def bound(self) -> int:
        """S: the greatest staleness at which a group may be trained, in versions."""
        ...

    @property
    def groups_per_step(self) -> int:
        """P: groups in the batch of one optimizer step."""
        ...

    @property
    def required_capacity(self) -> int:
        """Slots in the buffer."""
        ...

    def admit(self, held: int) -> bool:
        """Whether one more group may start while `held` slots are taken."""
        ...

    def select(
        self, waiting: Iterable[int], finished: Collection[int], room: int, passed: Callable[[int], int]
    ) -> tuple[int, ...]:
        """Return the finished groups, at most `room`, that are now certain to be in the batch that is being filled.

        `waiting` are the groups that hold a slot and were not taken yet, in order of admission; `finished` those of
        them that can be trained, in order of finishing; `room` the places left in the batch. `passed(ticket)` is the
        number of younger groups that were taken so far.
        """
        ...

    def evict(self, finished: Iterable[TrajectoryGroup], learner_version: int) -> tuple[int, ...]:
        """Return the groups that are thrown away because they are too old for a learner at `learner_version`."""
        ...

    def release(self, awaiting_load: Sequence[int], live: Sequence[int]) -> tuple[int, ...]:
        """Return the groups whose slots become free.

        Asked when a step is made (`live` is empty), and when the weights trained on the groups `live` are on every
        worker. `awaiting_load` are the trained groups that still hold a slot, in order of training.
        """
        ...

    def worst_staleness(self, now: int, place: int, passed: int) -> int:
        """Return how stale a waiting group can still become before it is trained.

        It would have staleness `now` in the next batch, `place` older groups wait, and `passed` younger ones were
        taken. A group in flight counts from the version that is live.
        """
        ...

    def check(self, batch: Sequence[TrajectoryGroup], learner_version: int) -> None:
        """Raise AssertionError when a group of `batch` would be trained staler than the bound."""
        ...


@dataclass(frozen=True)
class _BoundedStaleness:
    """What the policies share: the bound, the batch size, and the assertion at consumption."""

    bound: int
    """S: the greatest staleness at which a group may be trained, in versions."""
    groups_per_step: int
    """P: groups in the batch of one optimizer step."""

    def __post_init__(self) -> None:
        assert self.bound >= 0, f"a staleness bound is 0 or more, got {self.bound}"
        assert self.groups_per_step >= 1, f"a batch has at least one group, got {self.groups_per_step}"

    @property
    def required_capacity(self) -> int:
        """Slots in the buffer: (S+1)·P."""
        return (self.bound + 1) * self.groups_per_step

    def admit(self, held: int) -> bool:
        """Whether a slot is free while `held` are taken."""
        return held < self.required_capacity

    def check(self, batch: Sequence[TrajectoryGroup], learner_version: int) -> None:
        """Raise AssertionError when a group of `batch` is from the future or would be trained staler than the bound."""
        for group in batch:
            staleness = group_staleness(group, learner_version).total
            assert 0 <= staleness <= self.bound, (
                f"group {group.ticket} would be trained at staleness {staleness} (written by version "
                f"{group.first_version}, learner at {learner_version}); the bound is {self.bound}"
            )


@dataclass(frozen=True)
class StrictStaleness(_BoundedStaleness):
    """Slots in order of admission, batches oldest first; nothing is generated and then thrown away for its age.

    There are (S+1)·P slots. Each group holds one from its admission on, and a trained batch gives its P slots back only
    when the weights trained on it are live on every rollout worker. A batch is the P oldest groups that hold a slot, so
    a slow group holds up all younger ones (head-of-line blocking). S = 0 is synchronous training.

    The bound holds. Let group t be admitted when r batches have been released, and be trained in batch b.

    1. Batches are released in order, and batch r-1 only when version r is live on every worker. All tokens of t are
       sampled after its admission, so its first version is at least r.
    2. Every group of batches r .. b-1 is older than t: a batch takes the oldest groups that hold a slot, so a batch
       that is taken while t waits passes t by only for older ones, and one taken before t was admitted has only older
       ones.
    3. These groups are trained, so none was dropped; their batches are not yet released, so at the admission of t each
       of them held a slot. There are P·(b-r) of them and t itself needs one of the (S+1)·P slots:
       P·(b-r) + 1 <= (S+1)·P, hence b-r <= S.
    4. The staleness of t is b minus its first version, at most b-r <= S.

    Step 3 counts slots of batches in training and of batches whose weights are still being loaded, so the learner may
    train the next batch while a load is in flight. A dropped group (filtered, failed, cancelled) returns its slot at
    once: its replacement is the youngest of all and the proof holds for it as for any other. A worker that misses a
    load must serve no more groups before it has caught up, otherwise step 1 fails.
    """

    def select(
        self, waiting: Iterable[int], finished: Collection[int], room: int, passed: Callable[[int], int]
    ) -> tuple[int, ...]:
        """Return those of the `room` oldest groups that are finished.

        Only being dropped takes a group out of the oldest, and a finished group is not dropped; what is admitted later
        is younger. So each is certain to be in the batch, whatever becomes of the others.
        """
        return tuple(ticket for ticket in islice(waiting, room) if ticket in finished)

    def evict(self, finished: Iterable[TrajectoryGroup], learner_version: int) -> tuple[int, ...]:
        """Return nothing: no group gets too old."""
        return ()

    def release(self, awaiting_load: Sequence[int], live: Sequence[int]) -> tuple[int, ...]:
        """Return `live`, in any order within the oldest trained groups: versions go live in the order of training."""
        assert set(live) == set(awaiting_load[: len(live)]), (
            f"weights go live in the order of training: the oldest trained groups are {list(awaiting_load)}, "
            f"not {list(live)}"
        )
        return tuple(live)

    def worst_staleness(self, now: int, place: int, passed: int) -> int:
        """Return now + floor(place / P): all older groups are trained before it, P in each batch."""
        return now + place // self.groups_per_step


@dataclass(frozen=True)
class WindowedStaleness(StrictStaleness):
    """As strict, but finished groups may pass a slow one: at most W of them, each paid for with a slot.

    A younger group passes an older one when it is trained in an earlier batch. The buffer has (S+1)·P - W slots. With
    R places left in a batch, the R oldest waiting groups are certain to be in it, as in the strict policy, and a
    younger finished one may take the place of the youngest of them where that one was passed fewer than W times. With
    W = 0 this is the strict policy. The bound leaves little to win: while one group is under way at most S batches can
    be trained, in whatever order. Windows near S·P / 2 shorten the learner's waits by some percent where durations have
    a heavy tail and S is 4 or more; W = S·P leaves no slots to work ahead, and waits longer than strict.

    No group is passed more than W times. Let passed(t) count the groups younger than t that were taken; it does not
    grow from an older to a younger t. Whenever R places are left (P where no batch is open), every waiting group that
    is not among the R oldest has passed(t) <= W. It holds for a new group (0). Taking one of the R oldest leaves those
    outside as they are, and passes only groups that are inside. Taking a younger one puts the R-th oldest, d, outside:
    it and all that are outside and older than the one taken had passed <= passed(d) < W, and get one more. Dropping,
    and the opening of the next batch, only move groups inside. At the end of a batch R = 0, and all groups that still
    wait were passed at most W times.

    The bound holds. Steps 1 and 4 are those of the strict policy. Of the P·(b-r) groups of batches r .. b-1, at most W
    are younger than t, because each of these has passed t. The others are older, and at the admission of t each of them
    held a slot, as t does: P·(b-r) - W + 1 <= (S+1)·P - W, hence b-r <= S.

    Nothing waits for ever. Let R places of a batch be open: it holds P - R slots, and all earlier batches are released
    in the end. The other slots, at least R because there are at least P in all (W <= S·P), are taken by waiting groups,
    which finish, or are dropped and replaced. The R oldest of them may be taken as soon as they are finished, whatever
    has passed them. And a group is not left behind: a batch without t consists of groups that are older than t or pass
    it, so t is trained after at most (older waiting groups + W) / P batches.
    """

    window: int
    """W: the greatest number of younger groups that may be trained before any one group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.bound * self.groups_per_step
        assert 0 <= self.window <= most, (
            f"a window of {self.window} groups leaves {self.required_capacity} slots for batches of "
            f"{self.groups_per_step}; with bound {self.bound} it may be at most {most}"
        )

    @property
    def required_capacity(self) -> int:
        """Slots in the buffer: (S+1)·P - W."""
        return super().required_capacity - self.window

    def select(
        self, waiting: Iterable[int], finished: Collection[int], room: int, passed: Callable[[int], int]
    ) -> tuple[int, ...]:
        """Return the oldest finished groups that may pass the unfinished ones older than they are.

        Oldest first also finds a full batch wherever there is one: another choice passes more groups.
        """
        chosen: list[int] = []
        unfinished: list[int] = []
        for ticket in waiting:
            left = room - len(chosen)
            if left == 0:
                break
            if ticket not in finished:
                unfinished.append(ticket)
                continue
            if len(unfinished) >= left:
                displaced = unfinished[left - 1]
                passed_now = len(chosen) - bisect_right(chosen, displaced)
                if passed(displaced) + passed_now >= self.window:
                    break
            chosen.append(ticket)
        return tuple(chosen)

    def worst_staleness(self, now: int, place: int, passed: int) -> int:
        """Return now + floor((place + passes left) / P): all older groups, and those that may still pass it."""
        return now + (place + max(0, self.window - passed)) // self.groups_per_step


@dataclass(frozen=True)
class EvictStaleness(_BoundedStaleness):
    """Bounded on the average by admission, exactly by throwing away: what most systems do, to compare with.

    At learner version v one more group may start while (S + v + 1)·P > groups trained + groups in flight or finished
    (AReaL, arXiv 2505.24298, section 5.1). v·P are trained, so this is (S+1)·P slots that are free again as soon as the
    step is made. The first P to finish are the next batch. A slow group is passed by any number of others: when it is
    finished at last and staler than S, it is dropped (`DropReason.STALE`) and another is generated instead. That costs
    its tokens, and because slow groups are the long ones, it trains on shorter completions than the policy writes.

    Nothing waits for ever: while the learner waits at version v, all workers come to hold v, and groups that start then
    have staleness 0.
    """

    def select(
        self, waiting: Iterable[int], finished: Collection[int], room: int, passed: Callable[[int], int]
    ) -> tuple[int, ...]:
        """Return the first `room` groups in order of finishing."""
        return tuple(islice(finished, room))

    def evict(self, finished: Iterable[TrajectoryGroup], learner_version: int) -> tuple[int, ...]:
        """Return the groups that are staler than the bound."""
        return tuple(group.ticket for group in finished if learner_version - group.first_version > self.bound)

    def release(self, awaiting_load: Sequence[int], live: Sequence[int]) -> tuple[int, ...]:
        """Return all trained groups, which is at the step itself; nothing is left when their weights go live."""
        return tuple(awaiting_load)

    def worst_staleness(self, now: int, place: int, passed: int) -> int:
        """Return at most the bound: a group that would get staler is dropped."""
        return min(now, self.bound)


def make_policy(order: Order, bound: int, groups_per_step: int) -> StalenessPolicy:
    """Return the policy of the section `grpo.order`, for bound S and P groups in a step."""
    match order:
        case StrictOrder():
            return StrictStaleness(bound, groups_per_step)
        case WindowedOrder():
            return WindowedStaleness(bound, groups_per_step, order.window)
        case EvictOrder():
            return EvictStaleness(bound, groups_per_step)
