"""The problem cursor: an endless, shuffled walk through the training split that a checkpoint can keep as one number.

Every epoch visits each problem once, in an order that follows from seed and epoch alone, so that position k is the
same problem in a resumed run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlsys.types import Problem


class ProblemCursor:
    """Draws problems without end; `position` is how many were drawn."""

    def __init__(self, problems: Sequence[Problem], seed: int, position: int = 0) -> None:
        """`problems` must not be empty: the data loaders refuse an empty split."""
        assert problems, "a cursor needs problems"
        self._problems = problems
        self._seed = seed
        self._order_epoch = -1
        self._order: list[int] = []
        self.position = position

    def next(self) -> Problem:
        """Draw the next problem."""
        epoch, place = divmod(self.position, len(self._problems))
        if epoch != self._order_epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._problems)).tolist()
            self._order_epoch = epoch
        self.position += 1
        return self._problems[self._order[place]]

    def take(self, number: int) -> list[Problem]:
        """Draw several problems."""
        return [self.next() for _ in range(number)]
