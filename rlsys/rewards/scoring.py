"""Scoring: load the configured parts, and run them on completions under time limits.

Stands inside a reward scorer's process, between a completion's text and its `Score`. The one invariant: whatever a
part does (raise, hang, return nonsense), the other parts and the other completions are scored, and the failure is
recorded as a failure, never as a reward of 0.

    waits for             until                       woken by
    one call of one part  `timeout_seconds` are over  SIGALRM (real time), which raises inside the part
"""

from __future__ import annotations

import importlib
import math
import signal
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, MappingProxyType
from typing import cast

from rlsys.config import RewardPartConfig
from rlsys.errors import RewardError
from rlsys.rewards.allele import allele_reward
from rlsys.rewards.amino_acid import amino_acid_reward
from rlsys.rewards.answer import answer_reward
from rlsys.rewards.base import RewardPart
from rlsys.rewards.combine import weighted_sum
from rlsys.rewards.format import format_reward
from rlsys.types import PartScore, PartStatus, Problem, Score

SHIPPED_PARTS: Mapping[str, RewardPart] = MappingProxyType({
    "format": format_reward,
    "answer": answer_reward,
    "allele": allele_reward,
    "amino_acid": amino_acid_reward,
})  # fmt: skip
"""The parts that come with the project, by their `kind`."""


@dataclass(frozen=True)
class LoadedPart:
    """A part that is ready to be called, with what the configuration says of it."""

    function: RewardPart
    weight: float
    timeout_seconds: float


def load_parts(specs: Mapping[str, RewardPartConfig]) -> dict[str, LoadedPart]:
    """Load the parts under their names. Raises RewardError that names the part which cannot be loaded.

    A run does it twice: in the driver before anything is started, so that a mistake costs seconds, and in each scorer.
    """
    parts: dict[str, LoadedPart] = {}
    for name, spec in specs.items():
        try:
            parts[name] = load_part(spec)
        except RewardError as error:
            raise RewardError(f"rewards.{name}.function={spec.function}: {error}") from error
    return parts


def load_part(spec: RewardPartConfig) -> LoadedPart:
    """Find a shipped part by its kind, or import a user's function `package.module:name`.

    Raises RewardError where the function cannot be imported or is not callable.
    """
    if spec.kind == "function":
        assert spec.function is not None, "the configuration names a function wherever kind=function"
        function = _import_function(spec.function)
    else:
        function = SHIPPED_PARTS[spec.kind]
    return LoadedPart(function, spec.weight, spec.timeout_seconds)


def score_completions(problem: Problem, texts: Sequence[str], parts: Mapping[str, LoadedPart]) -> list[Score]:
    """Score each completion text of a problem by every part; one `Score` per text, in order.

    Must run in the main thread of its process, where alone Python delivers signals.
    """
    assert threading.current_thread() is threading.main_thread(), "time limits by signal need the main thread"
    weights = {name: part.weight for name, part in parts.items()}
    scores: list[Score] = []
    for text in texts:
        values = {name: _run_part(part, problem, text) for name, part in parts.items()}
        scores.append(Score(values, weighted_sum(values, weights)))
    return scores


class _TimeLimitError(BaseException):
    """Raised inside a part by the alarm. Not an Exception, so that a part that catches all of those is stopped too."""


def _run_part(part: LoadedPart, problem: Problem, text: str) -> PartScore:
    """Call one part; a user's code may raise anything, so this is the one place that catches all exceptions."""
    try:
        with _time_limit(part.timeout_seconds):
            return _checked(part.function(problem, text))
    except _TimeLimitError:
        return PartScore(math.nan, PartStatus.TIMED_OUT, f"ran longer than {part.timeout_seconds:g} s")
    # SystemExit: an `exit()` in somebody's function would otherwise end the scorer's process.
    except (Exception, SystemExit) as error:  # noqa: BLE001 (round foreign code: a failure becomes a counted value)
        return PartScore(math.nan, PartStatus.FAILED, f"{type(error).__name__}: {error}")


def _checked(value: object) -> PartScore:
    """Accept a finite number (numpy's count too); everything else is a failure of the part.

    Runs inside the part's time limit, because conversion and `repr` of a foreign object are foreign code too.
    """
    try:
        number = float(value) if not isinstance(value, str | bytes) else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        return PartScore(math.nan, PartStatus.FAILED, f"returned {value!r:.80}, which is not a finite number")
    return PartScore(number, PartStatus.OK)


@contextmanager
def _time_limit(seconds: float) -> Generator[None, None, None]:
    def on_alarm(_signal: int, _frame: FrameType | None) -> None:
        raise _TimeLimitError

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _import_function(path: str) -> RewardPart:
    module_name, separator, name = path.partition(":")
    if not (separator and module_name and name):
        raise RewardError(
            "not of the form package.module:name; for example my_rewards:score for `score` in my_rewards.py"
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"module {module_name!r} cannot be imported ({type(error).__name__}: {error}).\n"
            "Install it, or name the folder that holds it in PYTHONPATH."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        what = f"has no {name!r}" if found is None else f"holds a {type(found).__name__} there, which cannot be called"
        raise RewardError(f"module {module_name!r} {what}; name a function (problem, completion text) -> number")
    return cast("RewardPart", found)
