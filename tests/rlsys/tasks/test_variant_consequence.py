from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest

from rlsys.data import dna
from rlsys.errors import ConfigError
from rlsys.tasks.variant_consequence import (
    CodonChange,
    Consequence,
    ProteinChange,
    Splits,
    codon_changes,
    demonstration,
    floor,
    misread,
    parse_answer,
    problems,
)
from rlsys.types import Problem


def make(train: int = 300, validation: int = 60, test: int = 60, seed: int = 0, misread_rate: float = 0.0) -> Splits:
    return problems(
        train=train, validation=validation, test=test, seed=seed, window_codons=5, misread_rate=misread_rate
    )


def windows(split: Iterable[Problem]) -> list[str]:
    return [sequence for problem in split for sequence in problem.dna]


def test_the_changes_of_the_sense_codons_are_counted_by_class():
    # 61 sense codons x 9 changes = 549; the three stop codons have 23 sense neighbours (9 + 9 + 9 minus the 4 changes
    # between stops: TAA-TAG and TAA-TGA, each in both directions).
    counts = {consequence: len(changes) for consequence, changes in codon_changes().items()}
    assert sum(counts.values()) == 549
    assert counts[Consequence.NONSENSE] == 23
    same = sum(
        dna.GENETIC_CODE[ref] == dna.GENETIC_CODE[alt] != dna.STOP
        for ref in dna.GENETIC_CODE
        for alt in dna.GENETIC_CODE
        if sum(a != b for a, b in zip(ref, alt, strict=True)) == 1
    )
    assert counts[Consequence.SYNONYMOUS] == same


def test_a_problem_says_what_its_sequences_say():
    for problem in make().train:
        ref_window, alt_window = problem.dna
        allele = dna.difference(ref_window, alt_window)
        ref_codon, alt_codon = ref_window[6:9], alt_window[6:9]  # the third of five codons
        assert (len(ref_window), len(alt_window)) == (15, 15)
        assert allele.offset in (6, 7, 8)
        assert len(allele.ref) == len(allele.alt) == 1
        assert dna.STOP not in dna.translate(ref_window)
        assert (problem.facts["ref_codon"], problem.facts["alt_codon"]) == (ref_codon, alt_codon)
        truth = ProteinChange(dna.GENETIC_CODE[ref_codon], int(problem.facts["position"]), dna.GENETIC_CODE[alt_codon])
        assert parse_answer(problem.answer) == truth
        assert problem.facts["consequence"] == truth.consequence


def test_the_text_shows_a_coordinate_and_no_dna():
    # The same words around the position, so nothing in them can depend on the variant.
    for problem in make().train:
        assert problem.question == f"Protein change at codon {problem.facts['position']}?"
        assert problem.answer.find(problem.facts["position"]) > 0


def test_the_position_tells_nothing_about_the_class():
    # With 6,000 problems in 3 classes and 2 halves of the positions, each cell expects 1,000 with a standard
    # deviation of about 29 (binomial, n = 2,000, p = 1/2: 22, more for the drawn positions): 5 sigma is 150.
    train = make(train=6000).train
    cells = Counter((problem.facts["consequence"], int(problem.facts["position"]) < 550) for problem in train)
    assert all(abs(count - 1000) < 150 for count in cells.values())


def test_the_classes_are_balanced_in_every_split():
    for split in make(train=301):
        counts = Counter(problem.facts["consequence"] for problem in split)
        assert len(counts) == 3
        assert max(counts.values()) - min(counts.values()) <= 1


def test_no_two_problems_share_a_window():
    # 6,000 of them are nonsense, of 66,978 such windows: drawn with replacement, about 270 pairs would be equal.
    splits = problems(train=16_000, validation=1_000, test=1_000, seed=0, window_codons=3)
    every_window = [window for split in splits for window in windows(split)]
    assert len(every_window) == 2 * 18_000
    assert len(set(every_window)) == len(every_window)


def test_the_flanks_are_drawn_apart():
    assert all(window[:6] != window[9:] for window in windows(make(train=60).train))


def test_problem_ids_are_unique():
    ids = [problem.problem_id for split in make() for problem in split]
    assert len(set(ids)) == len(ids)


def test_the_same_seed_makes_the_same_problems():
    assert make(seed=3) == make(seed=3)
    assert windows(make(seed=3).test) != windows(make(seed=4).test)


def test_the_test_split_does_not_depend_on_the_training_split():
    assert make(train=30).test == make(train=90, misread_rate=0.5).test


def test_too_few_windows_are_an_error_that_names_the_key():
    # 18 sense codons lie next to a stop; with one flanking codon on each side they stand in 18 * 61 * 61 = 66,978
    # windows, of which a quarter (16,744) may be drawn, in each of 3 classes: 50,232.
    with pytest.raises(ConfigError, match=r"window_codons=3 has room for 50232 problems .* 50233 are asked for"):
        problems(train=50_000, validation=233, test=0, seed=0, window_codons=3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (ProteinChange("Arg", 117, "Ter"), "p.Arg117Ter nonsense"),
        (ProteinChange("Leu", 45, "Leu"), "p.Leu45= synonymous"),
        (ProteinChange("Gly", 12, "Asp"), "p.Gly12Asp missense"),
    ],
)
def test_an_answer_reads_as_hgvs_with_its_class_and_back(change: ProteinChange, text: str):
    assert str(change) == text
    assert parse_answer(text) == change


@pytest.mark.parametrize(
    "text",
    [
        "p.Arg117Ter missense",  # the class does not fit
        "p.Leu45Leu synonymous",  # HGVS writes =
        "p.Ter45Leu missense",  # no variant of a sense codon
        "p.Arg117Ter",
        "Arg117Ter nonsense",
        "p.Arg117Ter nonsense p.Arg117Ter nonsense",
        "p.Arg0117Ter nonsense",
        "p.Xyz117Ter nonsense",
        "p.Arg117Ter nonsense\n",
        "",
    ],
)
def test_other_text_is_no_answer(text: str):
    assert parse_answer(text) is None


def test_a_demonstration_states_codons_allele_amino_acids_and_answer():
    shown = demonstration(CodonChange("CGA", "TGA"), position=117)
    assert shown == "<think>CGA>TGA C>T Arg>Ter</think>\nAnswer: p.Arg117Ter nonsense"


def test_a_misreading_takes_one_of_the_two_other_nucleotides():
    # CGA>TGA: neither the C that was there nor the T that is there, so CGA>AGA or CGA>GGA.
    seen = {misread(CodonChange("CGA", "TGA"), random.Random(seed)) for seed in range(20)}
    assert seen == {CodonChange("CGA", "AGA"), CodonChange("CGA", "GGA")}


def test_demonstrations_end_in_the_right_answer_unless_misreading_is_asked_for():
    for split in make():
        assert all(problem.demonstration.endswith(f"\nAnswer: {problem.answer}") for problem in split)


def test_misreading_touches_the_wanted_share_of_training_demonstrations_only():
    splits = make(train=4000, misread_rate=0.25)
    wrong = [p for p in splits.train if p.demonstration.partition("</think>")[0] != _right_thinking(p)]
    # Binomial with n = 4,000, p = 0.25: mean 1,000, standard deviation 27; 5 sigma is 137.
    assert abs(len(wrong) - 1000) < 137
    held_out = (*splits.validation, *splits.test)
    assert all(p.demonstration.partition("</think>")[0] == _right_thinking(p) for p in held_out)


def test_a_misread_demonstration_is_consistent_with_itself():
    for problem in make(misread_rate=1.0).train:
        thinking, _, answer = problem.demonstration.partition("</think>\nAnswer: ")
        codons, _, amino_acids = thinking.removeprefix("<think>").split(" ")
        ref, alt = codons.split(">")
        assert amino_acids == f"{dna.GENETIC_CODE[ref]}>{dna.GENETIC_CODE[alt]}"
        position = int(problem.facts["position"])
        assert answer == str(ProteinChange(dna.GENETIC_CODE[ref], position, dna.GENETIC_CODE[alt]))
        assert (ref, alt) != (problem.facts["ref_codon"], problem.facts["alt_codon"])


def test_the_floor_is_the_share_of_the_most_frequent_change():
    def problem(answer: str, position: str) -> Problem:
        return Problem("p", "q", ("A",), answer, "", {"position": position})

    # Whatever the position, p.#: 2 of 4 are Tyr -> Ter.
    asked = [
        problem("p.Tyr117Ter nonsense", "117"),
        problem("p.Tyr230Ter nonsense", "230"),
        problem("p.Leu45= synonymous", "45"),
        problem("p.Gly12Asp missense", "12"),
    ]
    assert floor(asked) == 0.5


def test_the_floor_of_many_problems_is_near_its_exact_value():
    # Changes are drawn evenly within each class of a third. The most frequent one is Tyr -> Ter: 4 of the 23 nonsense
    # changes (TAC and TAT, each to TAA and TAG), 4/23/3 = 0.058; the next is Leu -> Leu, 18 of 134, with 0.045.
    assert floor(make(train=6000).train) == pytest.approx(4 / 23 / 3, abs=0.015)


def _right_thinking(problem: Problem) -> str:
    change = CodonChange(problem.facts["ref_codon"], problem.facts["alt_codon"])
    return demonstration(change, position=1).partition("</think>")[0]
