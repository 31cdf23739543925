"""The problem cursor: every epoch each problem once, and the same walk from the same position."""

from rlsys.data.cursor import ProblemCursor
from tests.fakes import problem

PROBLEMS = [problem(number) for number in range(7)]


def names(cursor: ProblemCursor, number: int) -> list[str]:
    return [one.problem_id for one in cursor.take(number)]


def test_every_epoch_visits_each_problem_once_in_another_order() -> None:
    cursor = ProblemCursor(PROBLEMS, seed=0)
    first, second = names(cursor, 7), names(cursor, 7)
    assert sorted(first) == sorted(second) == sorted(one.problem_id for one in PROBLEMS)
    assert first != second


def test_a_cursor_at_a_position_goes_on_as_the_one_that_came_there() -> None:
    walked = ProblemCursor(PROBLEMS, seed=3)
    names(walked, 10)
    assert names(ProblemCursor(PROBLEMS, seed=3, position=10), 20) == names(walked, 20)


def test_seeds_give_different_walks() -> None:
    assert names(ProblemCursor(PROBLEMS, seed=0), 7) != names(ProblemCursor(PROBLEMS, seed=1), 7)
