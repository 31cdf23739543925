"""A reward scorer: the configured parts, in a process of their own, each call under its time limit.

A part that fails, hangs or returns NaN gives a part score of that status; only the controller decides what follows.
The limits are enforced by a signal in the main thread (`rlsys.rewards.scoring`), which is why this class is
synchronous. Code that does not return to the interpreter escapes the signal; the controller's deadline for `score`
(`deadline_seconds`) then ends the whole process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlsys.config import RewardPartConfig
from rlsys.rewards.scoring import load_parts, score_completions
from rlsys.types import Problem, Score


class RewardScorer:
    """Scores the completions of one problem at a time."""

    def __init__(self, parts: Mapping[str, RewardPartConfig]) -> None:
        """Raises RewardError when a part cannot be loaded."""
        self._parts = load_parts(parts)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[Score]:
        """One Score for each text, in order."""
        return score_completions(problem, texts, self._parts)
