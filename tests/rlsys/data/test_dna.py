from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data import dna
from rlsys.errors import DataError

SEQUENCES = st.text(dna.ALPHABET, max_size=40)


def test_the_genetic_code_names_known_codons():
    # The start codon, the single tryptophan codon, and one of each box that splits in two (textbook facts).
    assert dna.GENETIC_CODE["ATG"] == "Met"
    assert dna.GENETIC_CODE["TGG"] == "Trp"
    assert (dna.GENETIC_CODE["CAC"], dna.GENETIC_CODE["CAG"]) == ("His", "Gln")
    assert (dna.GENETIC_CODE["AGC"], dna.GENETIC_CODE["AGG"]) == ("Ser", "Arg")


def test_the_genetic_code_has_its_known_degeneracy():
    counts: dict[str, int] = {}
    for name in dna.GENETIC_CODE.values():
        counts[name] = counts.get(name, 0) + 1
    assert len(dna.GENETIC_CODE) == 64
    assert {codon for codon, name in dna.GENETIC_CODE.items() if name == dna.STOP} == {"TAA", "TAG", "TGA"}
    assert {name for name, count in counts.items() if count == 6} == {"Leu", "Ser", "Arg"}
    assert {name for name, count in counts.items() if count == 4} == {"Val", "Pro", "Thr", "Ala", "Gly"}
    assert {name for name, count in counts.items() if count == 1} == {"Met", "Trp"}
    assert len(counts) == 21


def test_a_sequence_of_known_letters_is_accepted():
    dna.validate_sequence("ACGTN", problem_id="p1", index=0)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("ACGUA", r"problem p1: dna\[1\] has 'U' at position 3 \(0-based\); .*ACGTN only. Is this RNA\?"),
        ("acgt", r"has 'a' at position 0 .*upper case"),
        ("AC-T", r"has '-' at position 2 .*Write N"),
        ("ACGT\n", r"has '\\n' at position 4"),
        ("", r"problem p1: dna\[1\] is empty"),
    ],
)
def test_a_foreign_letter_is_named_with_its_place(sequence: str, message: str):
    with pytest.raises(DataError, match=message):
        dna.validate_sequence(sequence, problem_id="p1", index=1)


def test_the_reverse_complement_pairs_and_turns():
    assert dna.reverse_complement("AACGTN") == "NACGTT"


@given(SEQUENCES)
def test_the_reverse_complement_undoes_itself(sequence: str):
    assert dna.reverse_complement(dna.reverse_complement(sequence)) == sequence


def test_translation_reads_codons_from_the_first_letter():
    assert dna.translate("ATGTGATNG") == ("Met", "Ter", "Xaa")


def test_an_snv_replaces_one_letter():
    assert dna.apply_snv("ACGT", 2, "T") == "ACTT"


def test_an_snv_must_change_the_letter():
    with pytest.raises(AssertionError, match="G>G is no SNV"):
        dna.apply_snv("ACGT", 2, "G")


@pytest.mark.parametrize(
    ("ref", "alt", "expected"),
    [
        ("ACGT", "ACTT", (2, "G", "T")),
        ("ACGT", "ATTT", (1, "CG", "TT")),
        ("ACGT", "ACGGT", (3, "", "G")),  # after the run's last G: prefix first
        ("ACCCT", "ACCT", (3, "C", "")),
        ("ACGT", "ACGT", (4, "", "")),
        ("", "AC", (0, "", "AC")),
    ],
)
def test_the_difference_is_the_shortest_replacement(ref: str, alt: str, expected: tuple[int, str, str]):
    assert dna.difference(ref, alt) == expected


@given(SEQUENCES, SEQUENCES)
def test_the_difference_turns_one_sequence_into_the_other(ref: str, alt: str):
    allele = dna.difference(ref, alt)
    assert ref[allele.offset :].startswith(allele.ref)
    assert ref[: allele.offset] + allele.alt + ref[allele.offset + len(allele.ref) :] == alt


def test_an_allele_reads_as_ref_and_alt():
    assert str(dna.Allele(5, "C", "T")) == "C>T"
