"""Who works and who waits for what: busy and blocked time per role, integrated event by event.

The controller opens a context around everything a role does or waits for; nothing is sampled, so no wait between two
looks is missed. A step's metrics are the difference of two laps.

A role has members: the contexts that can be open for it at once. The learner has 1, all its ranks together; rollout has
one per worker, which is busy while it generates for any group, and otherwise blocked by what the next group waits for.
Each member is busy, blocked by one cause, or idle, which is what no context accounts for.

No wait is endless: `within` gives one a deadline, and an error that names who waited for what, and for how long.

Invariant: for each role, busy + blocked + idle seconds = members x elapsed seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from rlsys.errors import RoleError

T = TypeVar("T")

BALANCED_BELOW = 0.05
"""A wait below this fraction of a role's time is not worth a change of the ratio of rollout workers to learners."""


class Role(StrEnum):
    """The roles whose time is accounted."""

    ROLLOUT_WORKER = "rollout_worker"
    LEARNER = "learner"
    EMBEDDING_SERVICE = "embedding_service"
    REWARD_SCORER = "reward_scorer"


class Cause(StrEnum):
    """What a role can wait for."""

    GROUPS = "groups"
    """The learner waits for the next batch."""
    STALENESS_GATE = "staleness_gate"
    """Rollout waits for a slot: more groups would break the staleness bound (the buffer is full)."""
    WEIGHT_LOAD = "weight_load"
    """Weights are published or loaded."""
    EMBED_WAIT = "embed_wait"
    """A group waits for the features of its DNA."""
    REWARD_WAIT = "reward_wait"
    """Generated groups wait for their scores, and hold the slots of those that could come next."""
    EVALUATION = "evaluation"
    """A weight load is held back until an evaluation, which is pinned to one version, is done."""


WAITS: Mapping[Role, tuple[Cause, ...]] = {
    Role.ROLLOUT_WORKER: (
        Cause.STALENESS_GATE,
        Cause.WEIGHT_LOAD,
        Cause.EMBED_WAIT,
        Cause.REWARD_WAIT,
        Cause.EVALUATION,
    ),
    Role.LEARNER: (Cause.GROUPS, Cause.WEIGHT_LOAD, Cause.EMBED_WAIT, Cause.EVALUATION),
    Role.EMBEDDING_SERVICE: (),
    Role.REWARD_SCORER: (),
}
"""What each role can wait for. The services only answer: outside a call they are idle."""

_WAITERS = {
    Role.ROLLOUT_WORKER: "rollout workers wait",
    Role.LEARNER: "learner waits",
}
_WAITED_FOR = {
    Cause.GROUPS: "for groups",
    Cause.STALENESS_GATE: "at the staleness gate",
    Cause.WEIGHT_LOAD: "for weights",
    Cause.EMBED_WAIT: "for DNA features",
    Cause.REWARD_WAIT: "for scores",
    Cause.EVALUATION: "for an evaluation",
}
_CULPRITS = {
    Cause.GROUPS: "rollout workers are",
    Cause.STALENESS_GATE: "the learner is",
    Cause.WEIGHT_LOAD: "the weight transfer is",
    Cause.EMBED_WAIT: "the embedding service is",
    Cause.REWARD_WAIT: "reward scorers are",
    Cause.EVALUATION: "the evaluation is",
}


@dataclass(frozen=True)
class WaitTimes:
    """Seconds of all members of each role over a stretch of time."""

    member_seconds: Mapping[Role, float]
    """Members x elapsed seconds."""
    busy_seconds: Mapping[Role, float]
    blocked_seconds: Mapping[tuple[Role, Cause], float]

    def __sub__(self, earlier: WaitTimes) -> WaitTimes:
        """Return the times of the stretch between `earlier` and this, both counted from the same start."""
        return WaitTimes(
            {role: seconds - earlier.member_seconds[role] for role, seconds in self.member_seconds.items()},
            {role: seconds - earlier.busy_seconds[role] for role, seconds in self.busy_seconds.items()},
            {key: seconds - earlier.blocked_seconds[key] for key, seconds in self.blocked_seconds.items()},
        )

    def busy_fraction(self, role: Role) -> float:
        """Part of the role's time in which its members worked; 0 where no time has passed."""
        return self._fraction(role, self.busy_seconds[role])

    def blocked_fraction(self, role: Role, cause: Cause) -> float:
        """Part of the role's time in which its members waited for `cause`; 0 where no time has passed."""
        return self._fraction(role, self.blocked_seconds[role, cause])

    def fractions(self, role: Role) -> dict[str, float]:
        """Return how the role's time divides: `busy`, each cause, and `idle`; they add up to 1.

        `idle` below 0 says that more contexts were open at once than the role was said to have members.
        """
        parts = {"busy": self.busy_fraction(role)}
        parts |= {str(cause): self.blocked_fraction(role, cause) for cause in WAITS[role]}
        return parts | {"idle": 1.0 - sum(parts.values())}

    def bottleneck(self) -> str:
        """Return one sentence: the longest wait, and what to change to shorten it.

        Where the learner waits for groups, and rollout itself waits longer for features, scores or the like than it
        generates, what it waits for is named, not the rollout workers. Where the learner hardly waits, it is the
        learner that the rest is fast enough for, whatever the rollout workers wait for. Where both sides wait for each
        other at comparable length (the shorter wait is at least half the longer), it is the staleness bound that keeps
        them from overlapping: with S = 0 they take turns, whatever their numbers.
        """
        for_groups = self.blocked_fraction(Role.LEARNER, Cause.GROUPS)
        at_gate = self.blocked_fraction(Role.ROLLOUT_WORKER, Cause.STALENESS_GATE)
        if min(for_groups, at_gate) >= max(BALANCED_BELOW, for_groups / 2, at_gate / 2):
            return (
                f"learner waits {100 * for_groups:.0f} % for groups and rollout workers {100 * at_gate:.0f} % at the "
                f"staleness gate; the staleness bound is the bottleneck"
            )
        role, cause = max(self.blocked_seconds, key=lambda wait: self.blocked_fraction(*wait))
        fraction = self.blocked_fraction(role, cause)
        if fraction < BALANCED_BELOW:
            return f"no role waits for more than {100 * BALANCED_BELOW:.0f} % of its time; the run is balanced"
        behind = cause
        if cause is Cause.GROUPS:
            behind = self._behind_rollout()
        elif role is Role.ROLLOUT_WORKER and self._learner_waits() < BALANCED_BELOW:
            behind = Cause.STALENESS_GATE
        return f"{_WAITERS[role]} {100 * fraction:.0f} % {_WAITED_FOR[cause]}; {_CULPRITS[behind]} the bottleneck"

    def metrics(self) -> dict[str, float]:
        """Return the fractions under their names in `rlsys.metrics`; roles without members are left out."""
        return {
            f"time/{role}_{part}_fraction": value
            for role, seconds in self.member_seconds.items()
            if seconds > 0
            for part, value in self.fractions(role).items()
        }

    def _learner_waits(self) -> float:
        return sum(self.blocked_fraction(Role.LEARNER, cause) for cause in WAITS[Role.LEARNER])

    def _behind_rollout(self) -> Cause:
        role = Role.ROLLOUT_WORKER
        behind = [cause for cause in WAITS[role] if cause is not Cause.STALENESS_GATE]
        longest = max(behind, key=lambda cause: self.blocked_seconds[role, cause])
        return longest if self.blocked_seconds[role, longest] > self.busy_seconds[role] else Cause.GROUPS

    def _fraction(self, role: Role, seconds: float) -> float:
        total = self.member_seconds[role]
        return seconds / total if total > 0 else 0.0


class WaitClock:
    """Integrates open contexts over a clock.

    `clock` returns seconds and never goes back (`time.monotonic`, or the virtual clock of a simulation). `members` may
    leave roles out that a run does not have.
    """

    def __init__(self, clock: Callable[[], float], members: Mapping[Role, int]) -> None:
        self._clock = clock
        self._now = clock()
        self._members = {role: members.get(role, 0) for role in Role}
        self._busy_members = dict.fromkeys(Role, 0)
        self._blocked_members = dict.fromkeys(((role, cause) for role in Role for cause in WAITS[role]), 0)
        self._busy_seconds = dict.fromkeys(self._busy_members, 0.0)
        self._blocked_seconds = dict.fromkeys(self._blocked_members, 0.0)
        self._member_seconds = dict.fromkeys(Role, 0.0)
        self._last_lap = self.totals()

    @contextmanager
    def busy(self, role: Role) -> Generator[None]:
        """Count the time inside as work of one member of `role`."""
        self._advance()
        self._busy_members[role] += 1
        try:
            yield
        finally:
            self._advance()
            self._busy_members[role] -= 1

    @contextmanager
    def blocked(self, role: Role, cause: Cause) -> Generator[None]:
        """Count the time inside as waiting of one member of `role`; `cause` is one of `WAITS[role]`."""
        assert cause in WAITS[role], f"{role} is not known to wait for {cause}"
        self._advance()
        self._blocked_members[role, cause] += 1
        try:
            yield
        finally:
            self._advance()
            self._blocked_members[role, cause] -= 1

    def set_members(self, role: Role, members: int) -> None:
        """Note that a role has another number of members from now on (a worker was lost or came back)."""
        self._advance()
        self._members[role] = members

    def totals(self) -> WaitTimes:
        """Return the times since the clock was made."""
        self._advance()
        return WaitTimes(dict(self._member_seconds), dict(self._busy_seconds), dict(self._blocked_seconds))

    def lap(self) -> WaitTimes:
        """Return the times since the last lap: those of one step."""
        totals = self.totals()
        step, self._last_lap = totals - self._last_lap, totals
        return step

    def fractions(self, role: Role) -> dict[str, float]:
        """Return `totals().fractions(role)`."""
        return self.totals().fractions(role)

    def bottleneck(self) -> str:
        """Return `totals().bottleneck()`."""
        return self.totals().bottleneck()

    def _advance(self) -> None:
        """Add the time since the last event to everything that was open during it."""
        now = self._clock()
        elapsed, self._now = now - self._now, now
        assert elapsed >= 0, f"the clock went back by {-elapsed} s"
        for role in Role:
            self._member_seconds[role] += self._members[role] * elapsed
            self._busy_seconds[role] += self._busy_members[role] * elapsed
        for wait, members in self._blocked_members.items():
            self._blocked_seconds[wait] += members * elapsed


async def within(
    seconds: float | None, awaitable: Awaitable[T], *, role: str, call: str, state: Callable[[], str] | None = None
) -> T:
    """Return the result of `awaitable`, waiting at most `seconds` (None: for ever).

    Raises RoleError after the deadline, with `role`, `call`, the seconds waited, and what `state` then says of the
    rest; the awaitable is cancelled. A TimeoutError of its own passes unchanged.
    """
    loop = asyncio.get_running_loop()
    started, deadline = loop.time(), asyncio.timeout(seconds)
    try:
        async with deadline:
            return await awaitable
    except TimeoutError as error:
        if not deadline.expired():
            raise
        rest = "" if state is None else f"\n{state()}"
        raise RoleError(
            f"{role}: {call} did not end within {loop.time() - started:.0f} s, its deadline{rest}"
        ) from error
