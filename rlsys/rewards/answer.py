"""Reward part `answer`: the answer is exactly the known one."""

from __future__ import annotations

from rlsys.rewards.base import parse_completion
from rlsys.types import Problem


def normalise(answer: str) -> str:
    """Fold case, make each run of white space one space, and drop one full stop at the end."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def answer_reward(problem: Problem, completion_text: str) -> float:
    """Return 1 where the answer equals the problem's after `normalise`, else 0.

    The whole answer is compared: a list that holds the right one, or a longer name around it, scores 0.
    """
    parsed = parse_completion(completion_text)
    return float(parsed is not None and normalise(parsed.answer) == normalise(problem.answer))
