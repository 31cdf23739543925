"""KEGG disease pathways (BioReason, arXiv 2505.23579): to which disease does this allele contribute?

Stands between the rows of a data file and the problem cursor. The question gives a chromosome, a pathway, its genes and
the mutated gene; the reference and the variant sequence reach the policy as features. The allele itself is not in the
text, but most of the text already gives the answer away, which `fit_floor` measures.

The one invariant: however a problem's two sequences are cut (before anything is formatted), they differ in exactly the
allele in which the whole sequences differ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from rlsys.data import dna
from rlsys.data.problems import Row, read_rows, unique_problems
from rlsys.errors import DataError
from rlsys.rewards.answer import normalise
from rlsys.types import Problem

# How the dataset's one question template names the mutated gene.
_GENE = re.compile(r"biological effect of this (\S+) allele")


def read_problems(source: str, split: str, window_bp: int | None) -> tuple[Problem, ...]:
    """Read one split; `window_bp` cuts the sequences round the variant. Raises DataError."""
    return unique_problems(((row, kegg_problem(row, window_bp)) for row in read_rows(source, split)), source)


def kegg_problem(row: Row, window_bp: int | None) -> Problem:
    """Check a row and make a problem of it. Raises DataError that names the row."""
    question, answer, reasoning = (row.text(name) for name in ("question", "answer", "reasoning"))
    reference, variant = row.text("reference_sequence"), row.text("variant_sequence")
    for name, text in (("question", question), ("answer", answer)):
        if not text.strip():
            raise DataError(f"{row.where}: column {name!r} is empty.")
    problem_id = row.problem_id()
    try:
        dna.validate_sequence(reference, problem_id=problem_id, index=0)
        dna.validate_sequence(variant, problem_id=problem_id, index=1)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    allele = dna.difference(reference, variant)
    facts = {"ref_allele": allele.ref, "alt_allele": allele.alt}
    if found := _GENE.search(question):
        facts["gene"] = found.group(1)
    return Problem(
        problem_id=problem_id,
        question=question,
        dna=_windows(row, reference, variant, allele, window_bp),
        answer=answer.strip(),
        demonstration=_demonstration(reasoning, answer),
        facts=facts,
    )


def variant_windows(reference: str, variant: str, allele: dna.Allele, window_bp: int) -> tuple[str, str]:
    """Cut both sequences to the variant and the same letters before and after it; the longer one has `window_bp`.

    What both share before the variant starts at the same letter, so k-mers agree up to the variant; what they share
    after it ends at the same letter, so the windows differ in the allele and in nothing else. The variant is in the
    middle (an SNV at offset `window_bp // 2`) unless an end of the sequence is near: then the other side gets the rest.
    The alleles must not be longer than the window.
    """
    shared = window_bp - max(len(allele.ref), len(allele.alt))
    assert shared >= 0, f"{allele} does not fit into {window_bp} bp"
    before, after = allele.offset, len(reference) - allele.offset - len(allele.ref)
    left = min(before, max((shared + 1) // 2, shared - after))
    right = min(after, shared - left)
    start, ref_end, alt_end = allele.offset - left, allele.offset + len(allele.ref), allele.offset + len(allele.alt)
    return reference[start : ref_end + right], variant[start : alt_end + right]


def fit_floor(train: Sequence[Problem]) -> Callable[[Sequence[Problem]], float]:
    """Fit the best text-only guess that needs no thought, and return its accuracy as a function of problems.

    Each problem gets the most frequent training answer of its very question; of its gene, where the question is new; of
    all problems, where the gene is new too. Answers are compared as the reward compares them. What a policy scores
    above this floor it cannot have looked up.
    """
    by_question: dict[str, Counter[str]] = {}
    by_gene: dict[str, Counter[str]] = {}
    overall: Counter[str] = Counter()
    for problem in train:
        answer = normalise(problem.answer)
        overall[answer] += 1
        by_question.setdefault(problem.question, Counter())[answer] += 1
        if "gene" in problem.facts:
            by_gene.setdefault(problem.facts["gene"], Counter())[answer] += 1

    def floor(problems: Sequence[Problem]) -> float:
        right = 0
        for problem in problems:
            known = by_question.get(problem.question) or by_gene.get(problem.facts.get("gene", "")) or overall
            right += known.most_common(1)[0][0] == normalise(problem.answer)
        return right / len(problems)

    return floor


def _windows(row: Row, reference: str, variant: str, allele: dna.Allele, window_bp: int | None) -> tuple[str, str]:
    if window_bp is None:
        return reference, variant
    longest = max(len(allele.ref), len(allele.alt))
    if longest > window_bp:
        raise DataError(
            f"{row.where}: its variant replaces {len(allele.ref)} bp by {len(allele.alt)} bp, more than "
            f"task.window_bp={window_bp} can show; raise it to at least {longest}, or set it to null."
        )
    if not longest:  # equal sequences: there is no variant, so the middle stands for it
        allele = dna.Allele(len(reference) // 2, "", "")
    return variant_windows(reference, variant, allele, window_bp)


def _demonstration(reasoning: str, answer: str) -> str:
    """The assistant turn in BioReason's form, or empty where the row has no reasoning to imitate."""
    thought = reasoning.strip()
    return f"<think>\n{thought}\n</think>\n\nAnswer: {answer.strip()}" if thought else ""
