"""Reward part `allele`: the stated ref>alt is what the sequences differ in.

The truth is computed from the two sequences of the problem, so the part needs no annotation and scores any task whose
first two sequences are a reference and an alternative one.
"""

from __future__ import annotations

import re

from rlsys.data import dna
from rlsys.rewards.base import parse_completion
from rlsys.types import Problem

# Upper-case letters on both sides and no word around them, so that `Arg>Ter` is not read as an allele.
_REPLACEMENT = re.compile(r"(?<![A-Za-z])([ACGT]+)>([ACGT]+)(?![A-Za-z])")


def allele_reward(problem: Problem, completion_text: str) -> float:
    """Return 1 where the thinking states at least one replacement and every one agrees with the sequences, else 0.

    A replacement is written `C>T`; one with context, as the codons `CGA>TGA`, counts as the letters that it changes.
    Raises ValueError for a problem that has no two sequences.
    """
    if len(problem.dna) < 2:
        raise ValueError(f"problem {problem.problem_id} has {len(problem.dna)} sequence(s); an allele takes two")
    parsed = parse_completion(completion_text)
    if parsed is None:
        return 0.0
    stated = {_changed_letters(ref, alt) for ref, alt in _REPLACEMENT.findall(parsed.think)}
    return float(stated == {_changed_letters(problem.dna[0], problem.dna[1])})


def _changed_letters(ref: str, alt: str) -> tuple[str, str]:
    allele = dna.difference(ref, alt)
    return allele.ref, allele.alt
