"""Reward part `amino_acid`: the stated amino-acid change is the true one."""

from __future__ import annotations

import re

from rlsys.data import dna
from rlsys.rewards.base import parse_completion
from rlsys.types import Problem

_NAME = "|".join(sorted(set(dna.GENETIC_CODE.values())))
_CHANGE = re.compile(rf"(?<![A-Za-z])({_NAME})>({_NAME})(?![A-Za-z])")


def amino_acid_reward(problem: Problem, completion_text: str) -> float:
    """Return the share of the two amino acids (0, 1/2 or 1) that the thinking states rightly, as in `Arg>Ter`.

    The truth is in the problem's facts `ref_amino_acid` and `alt_amino_acid`. No change stated, or more than one,
    scores 0. Raises KeyError for a problem without these facts.
    """
    truth = problem.facts["ref_amino_acid"], problem.facts["alt_amino_acid"]
    parsed = parse_completion(completion_text)
    if parsed is None:
        return 0.0
    stated: list[tuple[str, str]] = _CHANGE.findall(parsed.think)
    if len(set(stated)) != 1:
        return 0.0
    return sum(said == true for said, true in zip(stated[0], truth, strict=True)) / 2
