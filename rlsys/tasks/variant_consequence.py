"""Variant consequence: name the protein change that a single-nucleotide variant causes, and its class.

A problem is a window of whole codons, in frame, centred on the codon that the variant hits, once as the reference has
it and once as the alternative allele has it. Everything is made from the standard genetic code and a seed: nothing is
downloaded. Stands where a run begins, beside the tasks that are read from files.

The one invariant: the question holds a coordinate and nothing else about the variant, so the DNA reaches a policy
through the encoder's features only, and no text-only policy does better than `floor`.

Demonstrations can be made fallible, as traces that people or other models wrote are: in a share of them the author
misreads the alternative nucleotide and reasons on from it without a further error. A warm start imitates that; a
reward that checks the sequences takes it away again. What is scored, and held-out demonstrations, are always right.

Simplified against real transcripts: one exon on the forward strand, no start codon, no stop-loss variants.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from rlsys.data import dna
from rlsys.errors import ConfigError
from rlsys.types import Problem

FIRST_POSITION, LAST_POSITION = 100, 999
"""Amino-acid positions that are asked about: three digits, so that chains of one class are equally long."""


class Consequence(StrEnum):
    """What a variant in a coding sequence does to the protein."""

    MISSENSE = "missense"
    """Another amino acid."""
    SYNONYMOUS = "synonymous"
    """The same amino acid."""
    NONSENSE = "nonsense"
    """A stop."""


class CodonChange(NamedTuple):
    """A sense codon and what a single-nucleotide variant makes of it."""

    ref: str
    alt: str

    @property
    def amino_acids(self) -> tuple[str, str]:
        """Three-letter names before and after, by the standard genetic code."""
        return dna.GENETIC_CODE[self.ref], dna.GENETIC_CODE[self.alt]

    @property
    def consequence(self) -> Consequence:
        """The class of the change."""
        return _consequence(*self.amino_acids)


class ProteinChange(NamedTuple):
    """An answer: the protein change as HGVS writes it, and its class."""

    ref_amino_acid: str
    position: int
    """Number of the amino acid in the protein, counted from 1 (HGVS)."""
    alt_amino_acid: str

    @property
    def consequence(self) -> Consequence:
        """The class of the change."""
        return _consequence(self.ref_amino_acid, self.alt_amino_acid)

    def __str__(self) -> str:
        alt = "=" if self.consequence is Consequence.SYNONYMOUS else self.alt_amino_acid
        return f"p.{self.ref_amino_acid}{self.position}{alt} {self.consequence}"


class Splits(NamedTuple):
    """Problems that share no window, neither reference nor alternative, within or between the splits."""

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]


def codon_changes() -> dict[Consequence, tuple[CodonChange, ...]]:
    """Return the 549 single-nucleotide changes of the 61 sense codons by class (392, 134, 23), in a fixed order."""
    changes: dict[Consequence, list[CodonChange]] = {consequence: [] for consequence in Consequence}
    for codon in _SENSE_CODONS:
        for offset in range(3):
            for alt in dna.NUCLEOTIDES.replace(codon[offset], ""):
                change = CodonChange(codon, dna.apply_snv(codon, offset, alt))
                changes[change.consequence].append(change)
    return {consequence: tuple(found) for consequence, found in changes.items()}


def problems(
    *, train: int, validation: int, test: int, seed: int, window_codons: int, misread_rate: float = 0.0
) -> Splits:
    """Make disjoint splits of the given sizes; the classes of each are balanced to within one problem.

    `misread_rate` is the expected share of training demonstrations with a misread nucleotide. The same seed gives the
    same problems, and the test split depends on neither that rate nor the sizes of the other splits.
    Raises ConfigError where windows of `window_codons` (odd, at least 3) codons are too few for the sizes.
    """
    assert window_codons >= 3, f"a window of {window_codons} codons has no flanks"
    assert window_codons % 2 == 1, f"a window of {window_codons} codons has no middle codon"
    _check_room(train + validation + test, window_codons)
    source = _WindowSource(random.Random(seed), window_codons)
    return Splits(
        test=_make_split("test", test, source, 0.0),
        validation=_make_split("validation", validation, source, 0.0),
        train=_make_split("train", train, source, misread_rate),
    )


def misread(change: CodonChange, rng: random.Random) -> CodonChange:
    """Return the change as somebody reports it who takes the alternative nucleotide for one of the other two."""
    allele = dna.difference(change.ref, change.alt)
    seen = rng.choice([letter for letter in dna.NUCLEOTIDES if letter not in (allele.ref, allele.alt)])
    return CodonChange(change.ref, dna.apply_snv(change.ref, allele.offset, seen))


def demonstration(change: CodonChange, position: int) -> str:
    """Return the assistant turn that SFT imitates: codons, allele, amino acids, then the answer.

    For example `<think>CGA>TGA C>T Arg>Ter</think>`, a newline, `Answer: p.Arg117Ter nonsense`.
    """
    allele = dna.difference(change.ref, change.alt)
    ref_amino_acid, alt_amino_acid = change.amino_acids
    steps = f"{change.ref}>{change.alt} {allele} {ref_amino_acid}>{alt_amino_acid}"
    return f"<think>{steps}</think>\nAnswer: {ProteinChange(ref_amino_acid, position, alt_amino_acid)}"


def parse_answer(text: str) -> ProteinChange | None:
    """Read an answer as `str(ProteinChange)` writes it, or None where it is not one.

    The class must fit the amino acids, so that `p.Arg117Ter missense` is no answer.
    """
    found = _ANSWER.fullmatch(text)
    if found is None:
        return None
    ref, position, alt = found.group("ref", "position", "alt")
    change = ProteinChange(ref, int(position), ref if alt == "=" else alt)
    return change if str(change) == text else None


def floor(problems: Sequence[Problem]) -> float:
    """Return the highest accuracy that answers from the text alone can reach on these problems.

    The question shows the position only, which is drawn independently of the variant. So the best text-only policy
    copies it and always names the change that is most frequent; that change's share here is the floor. (It is taken
    on the very problems that are scored, so it errs upwards.)
    """
    assert problems, "a floor needs problems"
    changes = Counter(problem.answer.replace(problem.facts["position"], "#") for problem in problems)
    return max(changes.values()) / len(problems)


_SENSE_CODONS = tuple(sorted(codon for codon, name in dna.GENETIC_CODE.items() if name != dna.STOP))
_NAMES = "|".join(sorted(set(dna.GENETIC_CODE.values()) - {dna.STOP}))
_ANSWER = re.compile(
    rf"p\.(?P<ref>{_NAMES})(?P<position>[1-9][0-9]*)(?P<alt>{_NAMES}|{dna.STOP}|=) (?:{'|'.join(Consequence)})"
)


def _consequence(ref_amino_acid: str, alt_amino_acid: str) -> Consequence:
    if alt_amino_acid == dna.STOP:
        return Consequence.NONSENSE
    return Consequence.SYNONYMOUS if alt_amino_acid == ref_amino_acid else Consequence.MISSENSE


class _WindowSource:
    """Draws variants in windows that were never drawn before, in either role (reference or alternative)."""

    def __init__(self, rng: random.Random, window_codons: int) -> None:
        self.rng = rng
        self._flank = window_codons // 2
        self._changes = codon_changes()
        self._seen: set[str] = set()

    def draw(self, consequence: Consequence) -> tuple[CodonChange, str, str]:
        """Return a change of the wanted class, the reference window and the alternative window."""
        while True:  # ends soon, because `_check_room` leaves most windows undrawn
            change = self.rng.choice(self._changes[consequence])
            before, after = ("".join(self.rng.choices(_SENSE_CODONS, k=self._flank)) for _ in range(2))
            ref_sequence, alt_sequence = (before + codon + after for codon in change)
            if self._seen.isdisjoint((ref_sequence, alt_sequence)):
                self._seen.update((ref_sequence, alt_sequence))
                return change, ref_sequence, alt_sequence


def _check_room(num_problems: int, window_codons: int) -> None:
    """Refuse to draw more than a quarter of the windows that exist of the rarest class."""
    rarest = {change.ref for change in codon_changes()[Consequence.NONSENSE]}
    num_windows = len(rarest) * len(_SENSE_CODONS) ** (window_codons - 1)
    room = num_windows // 4 * len(Consequence)
    if num_problems > room:
        raise ConfigError(
            f"task.window_codons={window_codons} has room for {room} problems in different windows, and "
            f"{num_problems} are asked for (train, validation and test); raise the first or lower "
            "task.train_problems."
        )


def _make_split(split: str, size: int, source: _WindowSource, misread_rate: float) -> tuple[Problem, ...]:
    classes = [list(Consequence)[number % len(Consequence)] for number in range(size)]
    source.rng.shuffle(classes)
    return tuple(
        _make_problem(f"{split}-{number}", consequence, source, misread_rate)
        for number, consequence in enumerate(classes)
    )


def _make_problem(problem_id: str, consequence: Consequence, source: _WindowSource, misread_rate: float) -> Problem:
    change, ref_sequence, alt_sequence = source.draw(consequence)
    position = source.rng.randint(FIRST_POSITION, LAST_POSITION)
    is_misread = source.rng.random() < misread_rate
    ref_amino_acid, alt_amino_acid = change.amino_acids
    return Problem(
        problem_id=problem_id,
        question=f"Protein change at codon {position}?",
        dna=(ref_sequence, alt_sequence),
        answer=str(ProteinChange(ref_amino_acid, position, alt_amino_acid)),
        demonstration=demonstration(misread(change, source.rng) if is_misread else change, position),
        facts={
            "position": str(position),
            "ref_codon": change.ref,
            "alt_codon": change.alt,
            "ref_amino_acid": ref_amino_acid,
            "alt_amino_acid": alt_amino_acid,
            "consequence": str(consequence),
        },
    )
