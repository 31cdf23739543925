"""Reward functions of users: what cannot be loaded is refused before anything starts; what breaks while the run goes on
is counted, and stops it only where it is too much."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.reward_scorer import RewardScorer
from actors.scorer_pool import ScorerPool
from rlsys.config import RewardPartConfig
from rlsys.errors import RewardError, RoleError
from rlsys.pipeline.waits import Role, WaitClock
from rlsys.rewards.failures import FailureGuard
from rlsys.types import PartStatus, Problem, Score, Trajectory
from tests.bad_input.conftest import Refused
from tests.fakes import completion, problem
from tests.rlsys.virtual_time import run_virtual, time_of_loop

FUNCTIONS = """\
import time

LIMIT = 3

def length(problem, text):
    return len(text) / 100

def raises(problem, text):
    raise ValueError("no such gene\\nand a second line")

def exits(problem, text):
    raise SystemExit("bye")

def hangs(problem, text):
    while True:
        time.sleep(0.01)

def hangs_on(problem, text):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass

def returns_nan(problem, text):
    return float("nan")

def returns_text(problem, text):
    return "very good"

def returns_nothing(problem, text):
    pass

def returns_too_much(problem, text):
    return 10 ** 400

class Broken:
    def __float__(self):
        raise RuntimeError("a tensor of two elements")

def returns_what_breaks(problem, text):
    return Broken()
"""


@pytest.fixture
def functions(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(workplace))
    (workplace / "users_rewards.py").write_text(FUNCTIONS)
    (workplace / "users_broken.py").write_text("import no_such_package\n")
    (workplace / "users_syntax.py").write_text("def score(:\n")
    (workplace / "users_exit.py").write_text("raise SystemExit(0)\n")
    return workplace


# ---------------------------------------------------------------- before anything starts

REFUSED: dict[str, tuple[str, list[str]]] = {
    "no colon": ("users_rewards.length", ["not of the form package.module:name", "my_rewards:score"]),
    "no module": ("no_such_module:score", ["module 'no_such_module' cannot be imported", "PYTHONPATH"]),
    "a module that misses a package": ("users_broken:score", ["'users_broken' cannot be imported", "no_such_package"]),
    "a module that is no Python": ("users_syntax:score", ["'users_syntax' cannot be imported", "SyntaxError"]),
    "a module that ends the program": ("users_exit:score", ["'users_exit' cannot be imported", "SystemExit"]),
    "a name that is missing": ("users_rewards:lenght", ["module 'users_rewards' has no 'lenght'", "name a function"]),
    "a name that is a number": (
        "users_rewards:LIMIT",
        ["holds a int there, which cannot be called", "name a function"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry", "real"])
def test_a_function_that_cannot_be_loaded_is_refused(
    case: str, dry_run: list[str], functions: Path, refused: Refused
) -> None:
    path, expected = REFUSED[case]
    message = refused("train", "run.yaml", *dry_run, f"rewards.mine={{kind: function, function: '{path}'}}")
    assert f"rewards.mine.function={path}: " in message
    assert [fragment for fragment in expected if fragment not in message] == [], message


def test_a_function_is_named_by_the_kind_for_it_only(functions: Path, refused: Refused) -> None:
    message = refused("train", "run.yaml", "rewards.answer.function=users_rewards:length")
    assert "rewards.answer: kind=answer with function=users_rewards:length" in message


# ---------------------------------------------------------------- while the run goes on

BREAKS: dict[str, tuple[PartStatus, str]] = {
    "raises": (PartStatus.FAILED, "ValueError: no such gene"),
    "exits": (PartStatus.FAILED, "SystemExit: bye"),
    "hangs": (PartStatus.TIMED_OUT, "ran longer than 0.05 s"),
    "hangs_on": (PartStatus.TIMED_OUT, "ran longer than 0.05 s"),
    "returns_nan": (PartStatus.FAILED, "returned nan, which is not a finite number"),
    "returns_text": (PartStatus.FAILED, "returned 'very good', which is not a finite number"),
    "returns_nothing": (PartStatus.FAILED, "returned None, which is not a finite number"),
    "returns_too_much": (PartStatus.FAILED, "which is not a finite number"),
    "returns_what_breaks": (PartStatus.FAILED, "RuntimeError: a tensor of two elements"),
}


def users_part(name: str) -> RewardPartConfig:
    return RewardPartConfig(kind="function", function=f"users_rewards:{name}", timeout_seconds=0.05)


@pytest.mark.parametrize("name", BREAKS)
def test_a_function_that_breaks_is_counted_and_the_other_parts_go_on(name: str, functions: Path) -> None:
    status, detail = BREAKS[name]
    scorer = RewardScorer({"mine": users_part(name), "length": users_part("length")})
    scores = scorer.score(problem(), ["four", "seven!!"])
    assert [score.parts["mine"].status for score in scores] == [status, status]
    assert detail in scores[0].parts["mine"].detail
    assert [score.parts["length"].value for score in scores] == [0.04, 0.07]
    assert all(math.isnan(score.reward) and not score.is_valid for score in scores)


def trajectories(part: str, number: int) -> list[Trajectory]:
    (score,) = RewardScorer({"mine": users_part(part)}).score(problem(), ["text"])
    return [Trajectory(completion(0), score)] * number


def test_a_run_stops_with_the_reason_when_more_than_the_configured_share_fails(functions: Path) -> None:
    guard = FailureGuard(max_failed_fraction=0.25)
    guard.record(trajectories("length", 30))
    guard.record(trajectories("raises", 10))  # 10 of 40: just what is allowed
    with pytest.raises(RewardError) as caught:
        guard.record(trajectories("raises", 1))
    message = str(caught.value)
    assert "11 of the last 41 trajectories could not be scored" in message
    assert "scoring.max_failed_fraction=0.25 allows (mine failed 11x)" in message
    assert "The last one: mine: ValueError: no such gene\n" in message
    assert "--resume" in message
    assert len(message.splitlines()) == 3


def test_a_run_is_not_stopped_by_its_first_failures(functions: Path) -> None:
    guard = FailureGuard(max_failed_fraction=0.0)
    guard.record(trajectories("raises", 31))
    with pytest.raises(RewardError, match="32 of the last 32"):
        guard.record(trajectories("raises", 1))


def test_failures_that_lie_far_back_are_forgotten(functions: Path) -> None:
    guard = FailureGuard(max_failed_fraction=0.5)
    guard.record([*trajectories("length", 20), *trajectories("raises", 20)])
    guard.record(trajectories("length", 256))
    guard.record(trajectories("raises", 128))  # 128 of the last 256: half, and not 148
    with pytest.raises(RewardError, match="129 of the last 256"):
        guard.record(trajectories("raises", 1))


# ---------------------------------------------------------------- a scorer that is lost


class Silent:
    """A scorer that never answers: code that does not return to the interpreter holds the alarm up."""

    async def score(self, problem: Problem, texts: Sequence[str]) -> list[Score]:
        await asyncio.Event().wait()
        raise AssertionError("nobody wakes it")


class Dead:
    """A scorer whose process is gone."""

    async def score(self, problem: Problem, texts: Sequence[str]) -> list[Score]:
        raise RoleError("reward scorer 0: its process died during score")


class Working:
    """A scorer that answers."""

    async def score(self, problem: Problem, texts: Sequence[str]) -> list[Score]:
        return RewardScorer({"answer": RewardPartConfig(kind="answer")}).score(problem, texts)


@pytest.mark.parametrize(("lost", "status", "detail"), [
    # Two texts of at most 5 s each, and 10 s of slack.
    (Silent(), PartStatus.TIMED_OUT, "the scorer did not answer within 20 s and was replaced"),
    (Dead(), PartStatus.FAILED, "reward scorer 0: its process died during score"),
], ids=["silent", "dead"])  # fmt: skip
def test_a_scorer_that_is_lost_is_replaced_and_its_group_counted(
    lost: Silent | Dead, status: PartStatus, detail: str
) -> None:
    replaced: list[object] = []

    async def replace(scorer: object) -> Working:
        replaced.append(scorer)
        return Working()

    async def run() -> tuple[list[Score], list[Score]]:
        parts = {"answer": RewardPartConfig(kind="answer", timeout_seconds=5.0)}
        pool = ScorerPool([lost], replace, parts, WaitClock(time_of_loop(), {Role.REWARD_SCORER: 1}))
        return await pool.score(problem(), ["a", "b"]), await pool.score(problem(), ["c"])

    first, second = run_virtual(run())
    assert replaced == [lost]
    assert [(score.parts["answer"].status, score.parts["answer"].detail) for score in first] == [(status, detail)] * 2
    assert all(math.isnan(score.reward) for score in first)
    assert [score.parts["answer"].status for score in second] == [PartStatus.OK]
