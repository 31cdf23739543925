"""Problems drawn by their measured pass rate: the source of problems where `grpo.curriculum` is given.

A group teaches where its rewards differ. With a pass rate of p its G rewards are all equal with probability
p^G + (1-p)^G, and the variance of one is p(1-p). So a measured problem weighs

    w(p) = max(floor, 4 p (1-p)),        1 at p = 1/2, `floor` where it is always or never solved,

and draws are in proportion to weights. A problem that is under way is not drawn again: its weight is 0 from its draw to
its `record`.

What the unmeasured problems weigh is the design. One each, as a problem of p = 1/2, would make a run of 1,300 draws
from 20,000 problems a walk that never sees a problem again and learns nothing from what it measures. So all U of them
together weigh

    E = v · min(U, max(EXPLORATION, W)),

with W the sum of the measured weights and v in [floor, 1] what first visits turned out to weigh lately: new problems
get as many draws as the measured ones where they are as good (v = 1), and fewer where they are not. EXPLORATION keeps
the first measured problems from being drawn again and again while there are few of them. Where few are left unmeasured
they weigh v each.

Invariant: no problem is forgotten. With N problems, each one that is not under way is drawn by each `next` with
probability at least floor / 2N, whatever was recorded. Proof: W <= N - U and E <= U, so W + E <= N.
A measured problem: w / (W + E) >= floor / N.
An unmeasured one, which are drawn uniformly: (E/U) / (W + E). If the minimum is U, this is v / (W + E) >= floor / N.
Else E = v·M with M = max(EXPLORATION, W) < U, and it is at least v M / (U (M + v M)) = v / (U (1 + v)) >= floor / 2N.
A problem whose group never reports (its role died) returns after N further draws, when a walk would have come back.
So the gap between two draws of a problem is in the mean at most N + 2N/floor draws more than its group takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlsys.config_grpo import CurriculumConfig
from rlsys.data.cursor import check_same_source, identity_of
from rlsys.types import Problem

EXPLORATION = 256
"""Weight of the unmeasured problems together while the measured ones weigh less. In simulated runs of 1,300 trained
groups 32 to 256 give equal shares of zero-variance groups; the largest visits the most problems and repeats least."""
FIRST_VISITS = 100
"""About how many first visits decide what the unmeasured problems are worth."""
UNIT = 1_000_000
"""Weights are whole multiples of 1 / UNIT: their sums are exact, so a restored state draws as the one it came from."""


class Curriculum:
    """Draws problems by pass rate; the same problems for the same seed and the same order of draws and records."""

    def __init__(self, problems: Sequence[Problem], config: CurriculumConfig, seed: int) -> None:
        """`problems` must not be empty, their ids must differ: the data loaders see to both."""
        assert problems, "a curriculum needs problems"
        self._problems = problems
        self._floor, self._memory = config.floor, config.memory
        self._seed = seed
        self._index = {problem.problem_id: index for index, problem in enumerate(problems)}
        assert len(self._index) == len(problems), "two problems have one id"
        self._random = np.random.default_rng((seed, 0))
        # Visiting a shuffled list from its start is drawing uniformly from what is left of it.
        self._first_visits: list[int] = np.random.default_rng((seed, 1)).permutation(len(problems)).tolist()
        self._visited = 0
        self._draws = 0
        self._under_way: dict[int, int] = {}
        """Problem -> number of its draw, oldest first."""
        self._pass_rates: dict[int, float] = {}
        self._first_visit_weight = 1.0
        self._weights = WeightTree(len(problems))

    def next(self) -> Problem:
        """Draw a problem that is not under way; where all are, the one that is so for the longest time."""
        self._draws += 1
        if self._under_way and self._draws - next(iter(self._under_way.values())) > len(self._problems):
            self._return(next(iter(self._under_way)))
        exploration = self._exploration_weight()
        total = exploration + self._weights.total
        if total == 0:
            index = next(iter(self._under_way))
            del self._under_way[index]
        elif (place := int(self._random.integers(total))) < exploration:
            index = self._first_visits[self._visited]
            self._visited += 1
        else:
            index = self._weights.find(place - exploration)
            self._weights.set(index, 0)
        self._under_way[index] = self._draws
        return self._problems[index]

    def record(self, problem_id: str, pass_rate: float) -> None:
        """Measure a problem: p <- memory · p + (1 - memory) · `pass_rate`, the first time p <- `pass_rate`.

        `pass_rate` is in [0, 1]: the mean over the group of what says whether the answer is right.
        """
        assert 0 <= pass_rate <= 1, f"problem {problem_id}: pass rate {pass_rate} is not in [0, 1]"
        index = self._index[problem_id]
        if index in self._pass_rates:
            self._pass_rates[index] = self._memory * self._pass_rates[index] + (1 - self._memory) * pass_rate
        else:
            self._pass_rates[index] = pass_rate
            weight = self._weight(index) / UNIT
            self._first_visit_weight += (weight - self._first_visit_weight) / FIRST_VISITS
        self._return(index)

    def state(self) -> dict[str, Any]:
        """Everything that decides the draws to come, as JSON-able data; problems by their ids."""
        return {
            **self._identity(),
            "random": self._random.bit_generator.state,
            "visited": self._visited,
            "draws": self._draws,
            "first_visit_weight": self._first_visit_weight,
            "under_way": {self._problems[index].problem_id: draw for index, draw in self._under_way.items()},
            "pass_rates": {self._problems[index].problem_id: rate for index, rate in self._pass_rates.items()},
            "returned": [self._problems[index].problem_id for index in self._returned_unmeasured()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Raises CheckpointError where it was taken from other problems or another seed."""
        check_same_source(self._identity(), state)
        self._random.bit_generator.state = state["random"]
        self._visited, self._draws = state["visited"], state["draws"]
        self._first_visit_weight = state["first_visit_weight"]
        oldest_first = sorted(state["under_way"].items(), key=lambda item: item[1])
        self._under_way = {self._index[name]: draw for name, draw in oldest_first}
        self._pass_rates = {self._index[name]: rate for name, rate in state["pass_rates"].items()}
        self._weights = WeightTree(len(self._problems))
        for index in (*self._pass_rates, *(self._index[name] for name in state["returned"])):
            if index not in self._under_way:
                self._weights.set(index, self._weight(index))

    def _identity(self) -> dict[str, Any]:
        return {"source": "curriculum", **identity_of(self._problems), "seed": self._seed}

    def _exploration_weight(self) -> int:
        """E, in units."""
        unvisited = len(self._problems) - self._visited
        bound = min(unvisited * UNIT, max(EXPLORATION * UNIT, self._weights.total))
        return math.ceil(self._first_visit_weight * bound)

    def _weight(self, index: int) -> int:
        """w(p), in units; a problem that was drawn and never measured counts as solved half of the time."""
        pass_rate = self._pass_rates.get(index, 0.5)
        return math.ceil(max(self._floor, 4 * pass_rate * (1 - pass_rate)) * UNIT)

    def _return(self, index: int) -> None:
        self._under_way.pop(index, None)
        self._weights.set(index, self._weight(index))

    def _returned_unmeasured(self) -> list[int]:
        return [
            index
            for index in self._first_visits[: self._visited]
            if index not in self._under_way and index not in self._pass_rates
        ]


class WeightTree:
    """Whole weights of n things, drawn from in proportion: a Fenwick tree, O(log n) for each call.

    See *A New Data Structure for Cumulative Frequency Tables* (Fenwick, 1994).
    """

    def __init__(self, number: int) -> None:
        self.total = 0
        """Sum of the weights, all 0 at first."""
        self._weights = [0] * number
        # _sums[i] is the sum of the weights of things [i - (i & -i), i).
        self._sums = [0] * (number + 1)

    def set(self, index: int, weight: int) -> None:
        """Give a thing another weight."""
        change = weight - self._weights[index]
        self._weights[index] = weight
        self.total += change
        position = index + 1
        while position < len(self._sums):
            self._sums[position] += change
            position += position & -position

    def find(self, place: int) -> int:
        """Return the thing that covers `place` in [0, total) when all lie in a row, each as long as its weight."""
        assert 0 <= place < self.total, f"place {place} of {self.total}"
        position = 0
        step = 1 << (len(self._sums) - 1).bit_length()
        while step:
            ahead = position + step
            if ahead < len(self._sums) and self._sums[ahead] <= place:
                position = ahead
                place -= self._sums[ahead]
            step >>= 1
        return position
