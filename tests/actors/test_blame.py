"""Who is said to hold up training, where one role at a time is slow: on the real controller, in virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from rlsys.pipeline.waits import Cause, Role, WaitTimes
from tests.actors.controller_rig import Rig
from tests.rlsys.virtual_time import run_virtual, time_of_loop

FAST, SLOW = 0.02, 1.0


def waits(bound: int, slow: str, **settings: Any) -> WaitTimes:
    """Of a run in which everybody is fast but one; generating and learning take some time anyway."""
    rig = Rig(time_of_loop(), bound=bound, steps=20, workers=1, **settings)
    seconds = dict.fromkeys(["learner", "rollout", "embedder", "scorer", "load"], 0.0)
    seconds |= {"learner": FAST, "rollout": FAST, slow: SLOW}
    rig.learner.seconds = seconds["learner"]
    rig.workers[0].seconds, rig.workers[0].load_seconds = seconds["rollout"], seconds["load"]
    rig.embedder.seconds, rig.scorer.seconds = seconds["embedder"], seconds["scorer"]
    run_virtual(rig.train())
    assert rig.waits is not None
    return rig.waits


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize(
    ("slow", "culprit"),
    [
        ("learner", "the learner is the bottleneck"),
        ("rollout", "rollout workers are the bottleneck"),
        ("embedder", "the embedding service is the bottleneck"),
        ("scorer", "reward scorers are the bottleneck"),
        ("load", "the weight transfer is the bottleneck"),
    ],
)
def test_the_one_slow_role_is_named_whatever_the_bound(slow: str, culprit: str, bound: int) -> None:
    assert waits(bound, slow).bottleneck().endswith(culprit)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_an_evaluation_that_holds_up_weights_is_named(bound: int) -> None:
    # Held-out problems are slow to write, the others are not.
    rig = Rig(time_of_loop(), bound=bound, steps=20, workers=1, every_versions=1)
    rig.learner.seconds = FAST
    worker = rig.workers[0]
    generate = worker.generate

    async def slow_when_held_out(prompt: Any, *arguments: Any) -> Any:
        worker.seconds = SLOW if int(prompt.problem_id.split("-")[1]) >= 100 else FAST
        return await generate(prompt, *arguments)

    worker.generate = slow_when_held_out
    run_virtual(rig.train())
    assert rig.waits is not None
    assert rig.waits.bottleneck().endswith("the evaluation is the bottleneck")
    assert rig.waits.blocked_fraction(Role.ROLLOUT_WORKER, Cause.EVALUATION) > 0.5
    assert rig.waits.fractions(Role.LEARNER)["idle"] == pytest.approx(0, abs=0.01), "the learner's wait has a name too"


def test_equal_roles_that_take_turns_wait_for_the_staleness_bound() -> None:
    rig = Rig(time_of_loop(), bound=0, steps=20, workers=1)
    rig.learner.seconds = rig.workers[0].seconds = SLOW
    run_virtual(rig.train())
    assert rig.waits is not None
    assert "the staleness bound is the bottleneck" in rig.waits.bottleneck()


def test_every_role_is_accounted_for() -> None:
    found = waits(1, "scorer")
    assert found.busy_fraction(Role.REWARD_SCORER) > 0.9
    assert found.busy_fraction(Role.LEARNER) == pytest.approx(20 * FAST / found.member_seconds[Role.LEARNER], rel=0.01)
    assert waits(1, "embedder").busy_fraction(Role.EMBEDDING_SERVICE) > 0.9
    for role in Role:
        assert 0 <= found.fractions(role)["idle"] <= 1
