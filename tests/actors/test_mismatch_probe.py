"""What the learner is given to compare with the engines, beside the step's own groups."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from actors.mismatch_probe import MOST_COMPLETIONS, MismatchProbe
from rlsys.config import GrpoConfig
from rlsys.data.batches import BatchMaker
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.staleness import StrictStaleness
from rlsys.types import Trajectory, TrajectoryGroup
from tests.fakes import FakeLearner, FakeRenderer, completion, problem, score


def group(ticket: int, versions: Sequence[int]) -> TrajectoryGroup:
    """A group with a completion of each version, whose rewards differ."""
    written = [
        Trajectory(completion(version, str(number)), score(float(number == 0)))
        for number, version in enumerate(versions)
    ]
    return TrajectoryGroup(ticket, problem(), FakeRenderer().render(problem()), tuple(written))


def probed(step: Sequence[int], waiting: Sequence[Sequence[int]], known: Sequence[int] = range(9)) -> list[set[int]]:
    """Versions of the completions that a learner at version 5 is given. `step`: newest version of each group of the
    step; `waiting`: versions in each finished group; `known`: those whose features are at hand.
    """
    buffer = TrajectoryBuffer(StrictStaleness(5, 9))
    learner = FakeLearner()
    learner.version = 5
    config = GrpoConfig(steps=9, groups_per_step=9, group_size=8)
    probe = MismatchProbe(learner, buffer, BatchMaker(config, 8), {ticket: {} for ticket in known})

    async def run() -> None:
        for versions in waiting:
            ticket = (await buffer.admit(problem)).ticket
            buffer.put(group(ticket, versions))
        await probe.run([group(100 + number, [version] * 2) for number, version in enumerate(step)])

    asyncio.run(run())
    return [versions for _, versions in learner.probed]


@pytest.mark.parametrize(
    ("step", "waiting", "known", "expected"),
    [
        ([4, 4], [[4, 4], [5, 5]], range(9), [{5}]),
        ([4, 5], [[5, 5]], range(9), []),
        ([4, 4], [[4, 4]], range(9), []),
        ([4, 4], [[4, 5, 5]], range(9), [{5}]),
        ([4, 4], [[5, 5], [5, 5]], [1], [{5}]),
        ([4, 4], [[5, 5]], [], []),
    ],
    ids=["finds one", "has its own", "none there", "mixed group", "features of the second", "no features"],
)
def test_completions_of_the_learners_version_are_found_where_the_step_has_none(
    step: list[int], waiting: list[list[int]], known: Sequence[int], expected: list[set[int]]
) -> None:
    assert probed(step, waiting, known) == expected


def test_a_probe_is_small() -> None:
    counts: list[int] = []

    class Counting(FakeLearner):
        async def probe(self, samples: Sequence[object], features: Sequence[object]) -> None:  # type: ignore[override]
            counts.append(len(samples))

    learner = Counting()
    buffer = TrajectoryBuffer(StrictStaleness(1, 1))
    config = GrpoConfig(steps=9, groups_per_step=1, group_size=8)

    async def run() -> None:
        buffer.put(group((await buffer.admit(problem)).ticket, [0] * 8))
        await MismatchProbe(learner, buffer, BatchMaker(config, 8), {0: {}}).run([])

    asyncio.run(run())
    assert counts == [MOST_COMPLETIONS]
