"""The problem cursor: every epoch each problem once, and the same walk from the same position."""

import json

import pytest

from rlsys.data.cursor import ProblemCursor
from rlsys.errors import CheckpointError
from tests.rlsys.groups import make_problem

PROBLEMS = [make_problem(number) for number in range(7)]


def names(cursor: ProblemCursor, number: int) -> list[str]:
    return [one.problem_id for one in cursor.take(number)]


def test_every_epoch_visits_each_problem_once_in_another_order() -> None:
    cursor = ProblemCursor(PROBLEMS, seed=0, stream="sft")
    first, second = names(cursor, 7), names(cursor, 7)
    assert sorted(first) == sorted(second) == sorted(one.problem_id for one in PROBLEMS)
    assert first != second


def test_a_cursor_at_a_position_goes_on_as_the_one_that_came_there() -> None:
    walked = ProblemCursor(PROBLEMS, seed=3, stream="sft")
    names(walked, 10)
    assert names(ProblemCursor(PROBLEMS, seed=3, stream="sft", position=10), 20) == names(walked, 20)


@pytest.mark.parametrize(("seed", "stream"), [(1, "sft"), (0, "grpo")])
def test_other_seeds_and_other_streams_give_other_walks(seed: int, stream: str) -> None:
    assert names(ProblemCursor(PROBLEMS, seed, stream), 7) != names(ProblemCursor(PROBLEMS, 0, "sft"), 7)


def test_a_restored_cursor_goes_on_as_the_one_that_was_saved() -> None:
    walked, restored = (ProblemCursor(PROBLEMS, seed=3, stream="grpo") for _ in range(2))
    names(walked, 10)
    walked.record("3", 1.0)
    restored.restore(json.loads(json.dumps(walked.state())))
    assert names(restored, 20) == names(walked, 20)


@pytest.mark.parametrize("other", [
    ProblemCursor(PROBLEMS[:6], seed=3, stream="grpo"),
    ProblemCursor([*PROBLEMS[:6], make_problem(7)], seed=3, stream="grpo"),
    ProblemCursor(PROBLEMS[::-1], seed=3, stream="grpo"),
    ProblemCursor(PROBLEMS, seed=4, stream="grpo"),
    ProblemCursor(PROBLEMS, seed=3, stream="sft"),
], ids=["number", "problems", "order", "seed", "stream"])  # fmt: skip
def test_a_position_in_another_walk_is_refused(other: ProblemCursor) -> None:
    expected = r"this run draws from \(source grpo walk, problems 7, ids [0-9a-f]{8}, seed 3\)"
    with pytest.raises(CheckpointError, match=expected):
        ProblemCursor(PROBLEMS, seed=3, stream="grpo").restore(other.state())
