from __future__ import annotations

from dataclasses import replace

import pytest

from rlsys.rewards.allele import allele_reward
from tests.rlsys.rewards.problems import NONSENSE, RIGHT, thinking


@pytest.mark.parametrize("text", ["C>T", "C>T CGA>TGA", "CGA>TGA", "The change c.349C>T\nmakes it CGA>TGA."])
def test_an_allele_that_agrees_with_the_sequences_is_rewarded(text: str):
    assert allele_reward(NONSENSE, thinking(text)) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "T>C",
        "C>A",
        "C>T C>A",  # hedging
        "C>T CGA>AGA",
        "C>T CGA>CGA",
        "C to T",
        "Arg>Ter",
        "xC>T",
        "C>Tx",
        "CC>TT",
    ],
)
def test_a_wrong_a_missing_or_a_second_allele_is_not_rewarded(text: str):
    assert allele_reward(NONSENSE, thinking(text)) == 0.0


def test_an_allele_outside_the_thinking_does_not_count():
    assert allele_reward(NONSENSE, "C>T <think></think>\nAnswer: C>T") == 0.0
    assert allele_reward(NONSENSE, "<think></think>\nAnswer: C>T") == 0.0


def test_the_truth_is_what_the_sequences_differ_in():
    swapped = replace(NONSENSE, dna=NONSENSE.dna[::-1])
    assert allele_reward(swapped, RIGHT) == 0.0
    assert allele_reward(swapped, thinking("T>C TGA>CGA")) == 1.0


def test_letters_around_an_insertion_do_not_matter():
    # ACGG against ACGGG: one G is inserted, which VCF writes with the letter before it.
    inserted = replace(NONSENSE, dna=("ACGGT", "ACGGGT"))
    assert allele_reward(inserted, thinking("C>CG")) == 1.0
    assert allele_reward(inserted, thinking("C>CT")) == 0.0


def test_a_problem_without_two_sequences_is_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="problem p1 has 1 sequence"):
        allele_reward(replace(NONSENSE, dna=("ACGT",)), RIGHT)
