"""DNA as text: alphabet, genetic code, strands, variants.

Stands before everything else that reads a sequence: a sequence is validated here once, where it enters from a file,
and trusted afterwards. The one invariant: positions are 0-based and intervals half-open; text that people read
(HGVS, genome browsers) counts from 1, and whoever writes such text adds the 1 there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from types import MappingProxyType
from typing import NamedTuple

from rlsys.errors import DataError

NUCLEOTIDES = "ACGT"
ALPHABET = "ACGTN"
"""The letters of a sequence; N is any nucleotide."""

STOP = "Ter"
"""HGVS's name of a stop codon, beside the three-letter names of the amino acids."""
UNKNOWN = "Xaa"
"""Translation of a codon that holds an N."""

AMINO_ACID_NAMES: Mapping[str, str] = MappingProxyType({
    "A": "Ala", "C": "Cys", "D": "Asp", "E": "Glu", "F": "Phe", "G": "Gly", "H": "His", "I": "Ile", "K": "Lys",
    "L": "Leu", "M": "Met", "N": "Asn", "P": "Pro", "Q": "Gln", "R": "Arg", "S": "Ser", "T": "Thr", "V": "Val",
    "W": "Trp", "Y": "Tyr", "*": STOP,
})  # fmt: skip
"""One-letter to three-letter names (IUPAC)."""

# NCBI translation table 1. Codons in the order TTT, TTC, TTA, TTG, TCT, ...: first letter slowest, letters as TCAG.
_TABLE_1 = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
GENETIC_CODE: Mapping[str, str] = MappingProxyType(
    {
        "".join(letters): AMINO_ACID_NAMES[name]
        for letters, name in zip(product("TCAG", repeat=3), _TABLE_1, strict=True)
    }
)
"""The standard genetic code: codon (DNA letters) to three-letter amino acid, `Ter` for the three stops."""

_OUTSIDE_ALPHABET = re.compile(f"[^{ALPHABET}]")
_COMPLEMENT = str.maketrans("ACGTN", "TGCAN")


class Allele(NamedTuple):
    """What differs between two sequences: at `offset` (0-based), `ref` stands in the one and `alt` in the other."""

    offset: int
    ref: str
    alt: str

    def __str__(self) -> str:
        return f"{self.ref}>{self.alt}"


def validate_sequence(sequence: str, *, problem_id: str, index: int) -> None:
    """Refuse a sequence that is empty or holds letters outside ACGTN.

    `index` is the place of the sequence in its problem. Raises DataError that names the first offending letter.
    """
    where = f"problem {problem_id}: dna[{index}]"
    if not sequence:
        raise DataError(f"{where} is empty; a sequence has at least one letter of {ALPHABET}.")
    found = _OUTSIDE_ALPHABET.search(sequence)
    if found is None:
        return
    letter = found.group()
    if letter in "Uu":
        hint = "Is this RNA? Write T for U."
    elif letter.upper() in ALPHABET:
        hint = "Write it in upper case."
    else:
        hint = "Write N where the nucleotide is not known."
    raise DataError(
        f"{where} has {letter!r} at position {found.start()} (0-based); the encoder knows {ALPHABET} only. {hint}"
    )


def reverse_complement(sequence: str) -> str:
    """Return the other strand, read in its own 5' to 3' direction; N stays N."""
    return sequence.translate(_COMPLEMENT)[::-1]


def translate(sequence: str) -> tuple[str, ...]:
    """Translate whole codons from offset 0 into three-letter amino acids; a codon with N becomes `Xaa`."""
    assert len(sequence) % 3 == 0, f"{len(sequence)} letters are not whole codons"
    return tuple(GENETIC_CODE.get(sequence[start : start + 3], UNKNOWN) for start in range(0, len(sequence), 3))


def apply_snv(sequence: str, offset: int, alt: str) -> str:
    """Return `sequence` with the one letter at `offset` (0-based) replaced by `alt`, which must differ from it."""
    assert 0 <= offset < len(sequence), f"offset {offset} lies outside a sequence of {len(sequence)} letters"
    assert alt in tuple(NUCLEOTIDES.replace(sequence[offset], "")), f"{sequence[offset]}>{alt} is no SNV"
    return sequence[:offset] + alt + sequence[offset + 1 :]


def difference(ref_sequence: str, alt_sequence: str) -> Allele:
    """Return the one replacement that turns `ref_sequence` into `alt_sequence`.

    The common prefix is taken off first and then the common suffix, so an indel inside a repeat is placed at its
    rightmost offset and the alleles of a pure insertion or deletion are empty on one side. Equal sequences give empty
    alleles at their end.
    """
    offset = _shared_prefix(ref_sequence, alt_sequence)
    ref, alt = ref_sequence[offset:], alt_sequence[offset:]
    suffix = _shared_prefix(ref[::-1], alt[::-1])
    return Allele(offset, ref[: len(ref) - suffix], alt[: len(alt) - suffix])


def _shared_prefix(one: str, other: str) -> int:
    """How many letters from the start on are the same in both."""
    differing = (position for position, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))
