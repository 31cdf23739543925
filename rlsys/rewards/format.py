"""Reward part `format`: the completion is one think block and one answer line."""

from __future__ import annotations

from rlsys.rewards.base import parse_completion
from rlsys.types import Problem


def format_reward(problem: Problem, completion_text: str) -> float:
    """Return 1 where the completion is well-formed (see `parse_completion`), else 0."""
    return float(parse_completion(completion_text) is not None)
