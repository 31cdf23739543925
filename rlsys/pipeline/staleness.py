"""How stale a group may be when it is trained: the rule that the trajectory buffer asks at every turn.

The staleness of a group is the learner's version when it is used minus the version that wrote its oldest first token.
`StrictStaleness` bounds it by admission: there are (S+1)·P slots, each group holds one from its admission on, and a
trained batch gives its P slots back only when the weights trained on it are live on every rollout worker. Batches are
the P oldest groups that hold a slot. Nothing is generated and then thrown away for its age.

Invariant: no group is trained at a staleness over S. Proof. Number batches from 0: batch b is trained at version b and
makes version b+1. Let group t be admitted when r batches have been released, and be trained in batch b.

1. Batches are released in order, and batch r-1 only when version r is live on every worker. All tokens of t are
   sampled after its admission, so its first version is at least r.
2. Every group of batches r .. b-1 is older than t: a batch takes the oldest groups that hold a slot, so a batch that is
   taken while t waits passes t by only for older ones, and one taken before t was admitted has only older ones.
3. These groups are trained, so none was dropped; their batches are not yet released, so at the admission of t each of
   them held a slot. There are P·(b-r) of them and t itself needs one of the (S+1)·P slots:
   P·(b-r) + 1 <= (S+1)·P, hence b-r <= S.
4. The staleness of t is b minus its first version, at most b-r <= S.

Step 3 counts slots of batches in training and of batches whose weights are still being loaded, so the learner may
train the next batch while a load is in flight. A dropped group (filtered, failed, cancelled) returns its slot at once:
its replacement is the youngest of all and the proof holds for it as for any other. A worker that misses a load must
serve no more groups before it has caught up, otherwise step 1 fails. S = 0 is synchronous training.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    last_version = max(trajectory.completion.version_spans[-1].version for trajectory in group.trajectories)
    return GroupStaleness(
        total=learner_version - group.first_version,
        in_flight=last_version - group.first_version,
        in_queue=learner_version - last_version,
    )


@dataclass(frozen=True)
class StrictStaleness:
    """Slots in order of admission, batches oldest first. It holds no state: the buffer tells it what it asks about.

    A slow group holds up all younger ones (head-of-line blocking); a rule that relaxes this is another class with the
    same methods.
    """

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

    def may_admit(self, num_held: int) -> bool:
        """Whether one more group may start while `num_held` slots are taken."""
        return num_held < self.required_capacity

    def select(self, waiting: Sequence[int], finished: Container[int]) -> tuple[int, ...] | None:
        """Return the tickets of the next batch, oldest first, or None while one of them is not finished.

        `waiting` are the tickets that hold a slot and are in no batch yet, in order of admission.
        """
        if len(waiting) < self.groups_per_step:
            return None
        oldest = tuple(waiting[: self.groups_per_step])
        return oldest if all(ticket in finished for ticket in oldest) else None

    def release(self, awaiting_load: Sequence[int], live: Sequence[int]) -> tuple[int, ...]:
        """Return the tickets whose slots become free now that the weights trained on `live` are on every worker.

        `awaiting_load` are the trained tickets that still hold a slot, in order of training. Versions go live in order.
        """
        assert set(live) == set(awaiting_load[: len(live)]), (
            f"weights go live in the order of training: the oldest trained groups are {list(awaiting_load)}, "
            f"not {list(live)}"
        )
        return tuple(live)

    def check(self, batch: Sequence[TrajectoryGroup], learner_version: int) -> None:
        """Raise AssertionError when a group of `batch` would be trained staler than the bound."""
        for group in batch:
            staleness = group_staleness(group, learner_version).total
            assert 0 <= staleness <= self.bound, (
                f"group {group.ticket} would be trained at staleness {staleness} (written by version "
                f"{group.first_version}, learner at {learner_version}); the bound is {self.bound}"
            )
