"""Where a run's problems come from: what every source of problems can do, and the plain one, an endless shuffled walk.

The controller draws a problem for each group that it admits, and tells the source how every finished group did. The
walk does not listen; `rlsys.data.curriculum` does.

Invariant of the walk: every epoch visits each problem once, in an order that follows from seed, stream and epoch alone,
so that position k is the same problem in a resumed run.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from rlsys.errors import CheckpointError
from rlsys.types import Problem


class ProblemSource(Protocol):
    """Draws problems without end, and can be put back to where a checkpoint found it."""

    def next(self) -> Problem:
        """Draw the next problem."""
        ...

    def record(self, problem_id: str, pass_rate: float) -> None:
        """Tell the result of a finished group, trained or filtered: how often its problem was solved, in [0, 1]."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that decides the problems to come, as JSON-able data for a checkpoint."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Raises CheckpointError where it was taken from a source of other problems."""
        ...


class ProblemCursor:
    """The walk; `position` is how many problems were drawn."""

    def __init__(self, problems: Sequence[Problem], seed: int, stream: str, position: int = 0) -> None:
        """`stream` names what the walk is for ("sft", "grpo"): walks of one seed and other streams are independent.

        `problems` must not be empty: the data loaders refuse an empty split.
        """
        assert problems, "a cursor needs problems"
        self._problems = problems
        self._seed = seed
        self._stream = stream
        self._order_epoch = -1
        self._order: list[int] = []
        self.position = position

    def next(self) -> Problem:
        """Draw the next problem."""
        epoch, place = divmod(self.position, len(self._problems))
        if epoch != self._order_epoch:
            random = np.random.default_rng((self._seed, zlib.crc32(self._stream.encode()), epoch))
            self._order = random.permutation(len(self._problems)).tolist()
            self._order_epoch = epoch
        self.position += 1
        return self._problems[self._order[place]]

    def take(self, number: int) -> list[Problem]:
        """Draw several problems."""
        return [self.next() for _ in range(number)]

    def record(self, problem_id: str, pass_rate: float) -> None:
        """A walk visits all problems alike, whatever becomes of them."""

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {**self._identity(), "position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Raises CheckpointError where it was taken from another walk."""
        check_same_source(self._identity(), state)
        self.position = state["position"]

    def _identity(self) -> dict[str, Any]:
        return {"source": f"{self._stream} walk", **identity_of(self._problems), "seed": self._seed}


def identity_of(problems: Sequence[Problem]) -> dict[str, Any]:
    """What tells the problems of a run from others: how many they are, and a checksum over their ids in order."""
    ids = "\n".join(problem.problem_id for problem in problems)
    return {"problems": len(problems), "ids": f"{zlib.crc32(ids.encode()):08x}"}


def check_same_source(identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise CheckpointError where `state` does not begin with the keys and values of `identity`."""
    saved = {key: state.get(key) for key in identity}
    if saved != dict(identity):
        was, is_now = (", ".join(f"{key} {value}" for key, value in one.items()) for one in (saved, identity))
        raise CheckpointError(
            f"the checkpoint drew its problems from ({was}), this run draws from ({is_now})\n"
            "Resume with the data, seed and grpo.curriculum that the run was begun with, or begin a new run"
        )
