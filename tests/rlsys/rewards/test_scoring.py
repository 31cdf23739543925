from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rlsys.config import RewardPartConfig
from rlsys.errors import RewardError
from rlsys.rewards.scoring import SHIPPED_PARTS, LoadedPart, load_part, score_completions
from rlsys.types import PartScore, PartStatus, Problem
from tests.rlsys.rewards.problems import NONSENSE, RIGHT, answering

HERE = "tests.rlsys.rewards.test_scoring"
NOT_CALLABLE = 3


def text_length(problem: Problem, completion_text: str) -> float:
    """A user's reward function."""
    return len(completion_text) / 100


def spec(**values: Any) -> RewardPartConfig:
    return RewardPartConfig.model_validate(values)


def run(function: Callable[[Problem, str], Any], text: str = RIGHT, timeout_seconds: float = 5.0) -> PartScore:
    """The score of one part on one completion."""
    (score,) = score_completions(NONSENSE, [text], {"part": LoadedPart(function, 1.0, timeout_seconds)})
    return score.parts["part"]


def hang(problem: Problem, completion_text: str) -> float:
    """Hangs, and swallows every exception that an unaware author could catch."""
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # noqa: BLE001
            continue


def test_a_right_completion_gets_every_shipped_part_in_full():
    parts = {name: load_part(spec(kind=name, weight=2.0)) for name in SHIPPED_PARTS}
    (score,) = score_completions(NONSENSE, [RIGHT], parts)
    assert {name: part.value for name, part in score.parts.items()} == dict.fromkeys(SHIPPED_PARTS, 1.0)
    assert score.reward == 8.0
    assert score.is_valid


def test_completions_are_scored_in_their_order():
    parts = {"answer": load_part(spec(kind="answer"))}
    scores = score_completions(NONSENSE, [RIGHT, answering("p.Arg118Ter nonsense"), RIGHT], parts)
    assert [score.reward for score in scores] == [1.0, 0.0, 1.0]


def test_a_part_that_raises_has_failed_and_says_why():
    def broken(problem: Problem, completion_text: str) -> float:
        raise ZeroDivisionError("no tokens")

    part = run(broken)
    assert (part.status, part.detail) == (PartStatus.FAILED, "ZeroDivisionError: no tokens")
    assert math.isnan(part.value)


def test_a_part_that_hangs_is_stopped_at_its_limit():
    part = run(hang, timeout_seconds=0.05)
    assert (part.status, part.detail) == (PartStatus.TIMED_OUT, "ran longer than 0.05 s")
    assert math.isnan(part.value)


def test_a_part_that_ends_the_program_has_failed():
    def quit_(problem: Problem, completion_text: str) -> float:
        raise SystemExit(1)

    assert run(quit_).status is PartStatus.FAILED


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1.0", [1.0], 1j, np.array([1.0, 2.0])])
def test_what_is_no_finite_number_has_failed(value: object):
    part = run(lambda problem, text: value)
    assert part.status is PartStatus.FAILED
    assert "which is not a finite number" in part.detail


@pytest.mark.parametrize("value", [1, True, np.float32(1.0), np.array(1.0)])
def test_every_kind_of_number_is_a_value(value: object):
    assert run(lambda problem, text: value) == PartScore(1.0, PartStatus.OK)


def test_a_failed_part_leaves_the_others_and_the_other_completions_alone():
    def picky(problem: Problem, completion_text: str) -> float:
        if completion_text == RIGHT:
            raise ValueError("too good")
        return 1.0

    parts = {"picky": LoadedPart(picky, 1.0, 5.0), "format": load_part(spec(kind="format"))}
    failed, scored = score_completions(NONSENSE, [RIGHT, "nothing"], parts)
    assert math.isnan(failed.reward)
    assert failed.parts["format"] == PartScore(1.0, PartStatus.OK)
    assert scored.reward == 1.0


def test_the_alarm_is_put_back_as_it_was():
    def earlier(number: int, frame: object) -> None:
        raise AssertionError("an alarm was left behind")

    before = signal.signal(signal.SIGALRM, earlier)
    try:
        run(hang, timeout_seconds=0.01)
        assert signal.getsignal(signal.SIGALRM) is earlier
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_scoring_outside_the_main_thread_is_refused():
    raised: list[BaseException] = []

    def score() -> None:
        try:
            score_completions(NONSENSE, [RIGHT], {})
        except AssertionError as error:
            raised.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


def test_a_users_function_is_found_by_its_dotted_path():
    part = load_part(spec(kind="function", function=f"{HERE}:text_length", weight=0.5, timeout_seconds=1.5))
    assert (part.weight, part.timeout_seconds) == (0.5, 1.5)
    (score,) = score_completions(NONSENSE, ["x" * 60], {"length": part})
    assert score.reward == pytest.approx(0.3)  # 60 / 100 * 0.5


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rewards", "package.module:name"),
        (":score", "package.module:name"),
        ("no_such_module_of_mine:score", "'no_such_module_of_mine' cannot be imported .*No module named"),
        (f"{HERE}:no_such_name", "has no"),
        (f"{HERE}:NOT_CALLABLE", "holds a int there, which cannot be called"),
    ],
)
def test_a_function_that_cannot_be_used_is_an_error(path: str, message: str):
    with pytest.raises(RewardError, match=message):
        load_part(spec(kind="function", function=path))
