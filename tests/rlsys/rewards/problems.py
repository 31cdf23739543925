"""One problem that all reward parts can score, and completions of it."""

from __future__ import annotations

from rlsys.types import Problem

NONSENSE = Problem(
    problem_id="p1",
    question="Protein change at codon 117?",
    dna=("ACGCGAACG", "ACGTGAACG"),
    answer="p.Arg117Ter nonsense",
    demonstration="",
    facts={"ref_amino_acid": "Arg", "alt_amino_acid": "Ter"},
)
RIGHT = "<think>CGA>TGA C>T Arg>Ter</think>\nAnswer: p.Arg117Ter nonsense"


def thinking(text: str) -> str:
    """A well-formed completion with the right answer and this thinking."""
    return f"<think>{text}</think>\nAnswer: p.Arg117Ter nonsense"


def answering(text: str) -> str:
    """A well-formed completion (where `text` is one line) with the right thinking and this answer."""
    return f"<think>CGA>TGA C>T Arg>Ter</think>\nAnswer: {text}"
