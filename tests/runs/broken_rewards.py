"""Reward functions as users write them on a bad day."""

from __future__ import annotations

import time

from rlsys.types import Problem


def raises(problem: Problem, completion_text: str) -> float:
    """Never gets anywhere."""
    raise RuntimeError("the oracle is down")


def hangs_on_some(problem: Problem, completion_text: str) -> float:
    """Needs for ever for every eighth problem."""
    if int(problem.problem_id.rpartition("-")[2]) % 8 == 0:
        time.sleep(3600)
    return float(len(completion_text) % 3)
