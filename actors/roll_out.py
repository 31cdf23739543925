"""The rollout loop: every group from its admission to the buffer, one task each.

    admit -> render -> embed -> generate -> score -> put, or drop

| waits for | until | woken by |
|---|---|---|
| a slot | the staleness policy admits one more group | `release` after a load; a dropped group |
| features, completions, scores of a group | the role answers or its deadline runs out | the role |

Whoever wants to know about finished groups is an observer: it is told of each, dropped or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.episodes import Episodes, Generated
from actors.ports import FeaturesRef, Sampling
from actors.rollout_activity import RolloutActivity
from actors.scorer_pool import ScorerPool
from rlsys.data.batches import BatchMaker, pass_rate
from rlsys.data.cursor import ProblemSource
from rlsys.errors import RewardError
from rlsys.pipeline.buffer import Admission, TrajectoryBuffer
from rlsys.pipeline.waits import Cause
from rlsys.types import Trajectory, TrajectoryGroup

FRUITLESS_BATCHES = 20
"""Batches' worth of groups that may be dropped in a row before the run stops and says why."""

GroupObserver = Callable[[Generated, TrajectoryGroup], None]
"""Told of each finished group."""


class RollOut:
    """Keeps the buffer full."""

    def __init__(
        self,
        sampling: Sampling,
        *,
        episodes: Episodes,
        scorers: ScorerPool,
        activity: RolloutActivity,
        buffer: TrajectoryBuffer,
        source: ProblemSource,
        batches: BatchMaker,
        observers: Sequence[GroupObserver],
        fruitless_groups: int,
    ) -> None:
        """The run stops when `fruitless_groups` groups in a row had to be dropped."""
        self._sampling = sampling
        self._episodes = episodes
        self._scorers = scorers
        self._activity = activity
        self._buffer = buffer
        self._source = source
        self._batches = batches
        self._observers = observers
        self._fruitless_groups = fruitless_groups
        self._flights: set[asyncio.Task[None]] = set()
        self._dropped_in_a_row = 0
        self.features: dict[int, FeaturesRef] = {}
        """References to the features of groups in the buffer, by ticket."""

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Admit groups for ever; their tasks are in `tasks`."""
        for admission in self._buffer.in_flight():  # a resumed run: the same problems under the same tickets
            self._take_off(tasks, admission)
        while True:
            self._take_off(tasks, await self._buffer.admit(self._source.next))

    def cancel(self) -> None:
        """Give up all groups under way."""
        for flight in tuple(self._flights):
            flight.cancel()

    def forget_dropped(self) -> None:
        """Let go of the features of groups that the buffer dropped after they were finished (too old)."""
        for ticket in [ticket for ticket in self.features if ticket not in self._buffer]:
            del self.features[ticket]

    def _take_off(self, tasks: asyncio.TaskGroup, admission: Admission) -> None:
        flight = tasks.create_task(self._one(admission))
        self._flights.add(flight)
        flight.add_done_callback(self._flights.discard)

    async def _one(self, admission: Admission) -> None:
        generated = await self._episodes.generate(admission.problem, self._sampling)
        with self._activity.group_waits(Cause.REWARD_WAIT):
            scores = await self._scorers.score(admission.problem, [one.text for one in generated.completions])
        trajectories = tuple(map(Trajectory, generated.completions, scores))
        group = TrajectoryGroup(admission.ticket, admission.problem, generated.prompt, trajectories)
        solved = pass_rate(group)
        if solved is not None:
            self._source.record(group.problem.problem_id, solved)
        for observe in self._observers:
            observe(generated, group)
        reason = self._batches.reason_to_drop(group)
        if reason is None:
            self._dropped_in_a_row = 0
            self.features[group.ticket] = generated.features
            self._buffer.put(group)
        else:
            self._buffer.drop(group.ticket, reason, group.generated_tokens)
            self._note_dropped()

    def _note_dropped(self) -> None:
        """Stop a run that can't learn: it would otherwise generate for ever without a single step."""
        self._dropped_in_a_row += 1
        if self._dropped_in_a_row >= self._fruitless_groups:
            raise RewardError(
                f"none of the last {self._fruitless_groups} groups could be trained on: in each, all "
                f"{self._sampling.completions} rewards were equal (the policy never succeeds, or always does), or all "
                "completions were left out (not scored, cut at the limit, or with log-probabilities that are not "
                "finite).\n"
                "Train the warm start longer, reward steps on the way, raise grpo.group_size, or set "
                "grpo.filter_zero_variance=false"
            )
