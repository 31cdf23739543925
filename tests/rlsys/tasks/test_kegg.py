"""KEGG rows: checks, windows round the variant, the text-only floor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data import dna
from rlsys.data.problems import Row
from rlsys.errors import DataError
from rlsys.rewards.answer import answer_reward
from rlsys.rewards.base import parse_completion
from rlsys.tasks.kegg import fit_floor, kegg_problem, read_problems, variant_windows
from rlsys.types import Problem

# 100 real rows of two splits, beside the checkout where somebody put them (their licence keeps them out of it).
REAL_ROWS = Path(__file__).resolve().parents[4] / "shared" / "data" / "kegg"

QUESTION = "Chromosome Number: 17\n\nGiven this context, what is the biological effect of this PFN1 allele?"


def row(**changes: object) -> Row:
    columns = {
        "question": QUESTION,
        "answer": "amyotrophic lateral sclerosis",
        "reasoning": "Step 1: C>G.\nStep 2: actin.",
        "reference_sequence": "AACAA",
        "variant_sequence": "AAGAA",
        **changes,
    }
    return Row("train.jsonl:3", "train:3", {name: value for name, value in columns.items() if value is not ...})


def message_of(row: Row, window_bp: int | None = None) -> str:
    with pytest.raises(DataError) as caught:
        kegg_problem(row, window_bp)
    return str(caught.value)


# ---------------------------------------------------------------- rows


def test_a_row_becomes_a_problem() -> None:
    assert kegg_problem(row(), None) == Problem(
        problem_id="train:3",
        question=QUESTION,
        dna=("AACAA", "AAGAA"),
        answer="amyotrophic lateral sclerosis",
        demonstration="<think>\nStep 1: C>G.\nStep 2: actin.\n</think>\n\nAnswer: amyotrophic lateral sclerosis",
        facts={"ref_allele": "C", "alt_allele": "G", "gene": "PFN1"},
    )


def test_a_demonstration_earns_the_answer_reward_itself() -> None:
    problem = kegg_problem(row(answer=" Amyotrophic lateral sclerosis\n"), None)
    assert answer_reward(problem, problem.demonstration) == 1


def test_a_row_without_reasoning_has_no_demonstration() -> None:
    assert kegg_problem(row(reasoning=" \n"), None).demonstration == ""


def test_a_question_of_another_form_names_no_gene() -> None:
    assert "gene" not in kegg_problem(row(question="Which disease?"), None).facts


@pytest.mark.parametrize(("changes", "expected"), [
    *(({name: ...}, f"train.jsonl:3: no column '{name}'; the row has ") for name in
      ("question", "answer", "reasoning", "reference_sequence", "variant_sequence")),
    ({"answer": 3}, "train.jsonl:3: column 'answer' is a number, not text: 3"),
    ({"question": "  "}, "train.jsonl:3: column 'question' is empty"),
    ({"answer": ""}, "train.jsonl:3: column 'answer' is empty"),
    ({"reference_sequence": ""}, "train.jsonl:3: problem train:3: dna[0] is empty"),
    ({"variant_sequence": ""}, "train.jsonl:3: problem train:3: dna[1] is empty"),
    ({"reference_sequence": "AACXA"}, "train.jsonl:3: problem train:3: dna[0] has 'X' at position 3 (0-based)"),
    ({"variant_sequence": "AAGUA"}, "dna[1] has 'U' at position 3 (0-based)"),
    ({"variant_sequence": "AAgAA"}, "dna[1] has 'g' at position 2"),
    ({"variant_sequence": "AAG AA", "id": "rs1"}, "train.jsonl:3: problem rs1: dna[1] has ' ' at position 3"),
])  # fmt: skip
def test_a_row_that_cannot_be_used_is_named_with_its_fault(changes: dict[str, object], expected: str) -> None:
    assert expected in message_of(row(**changes))


def test_a_duplicate_id_names_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    lines = [json.dumps({**row().columns, "id": name}) for name in ("a", "b", "a")]
    file.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_problems(str(file), "train", None)
    assert f"{file}:3: the problem id 'a' was already given in {file}:1" in str(caught.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("\n")
    with pytest.raises(DataError, match="the dataset is empty"):
        read_problems(str(file), "train", None)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(("reference", "variant", "window_bp", "expected"), [
    # SNV, odd and even windows: the variant is at offset window_bp // 2.
    ("AAAACTTTT", "AAAAGTTTT", 3, ("ACT", "AGT")),
    ("AAAACTTTT", "AAAAGTTTT", 4, ("AACT", "AAGT")),
    ("AAAACTTTT", "AAAAGTTTT", 1, ("C", "G")),
    # Insertion of GG: the longer window has 6 letters, both have AA before and TT after.
    ("AAAATTTT", "AAAAGGTTTT", 6, ("AATT", "AAGGTT")),
    # Deletion of GG: the same the other way round.
    ("AAAAGGTTTT", "AAAATTTT", 6, ("AAGGTT", "AATT")),
    # Near the start (1 letter before) and near the end (1 letter after): the other side gets the rest.
    ("ACTTTTTT", "AGTTTTTT", 5, ("ACTTT", "AGTTT")),
    ("AAAAAACT", "AAAAAAGT", 5, ("AAACT", "AAAGT")),
    # Larger than the sequences: whole.
    ("AACTT", "AAGTT", 9, ("AACTT", "AAGTT")),
    # The variant fills the window.
    ("AAACCCTTT", "AAAGTGTTT", 3, ("CCC", "GTG")),
    # No variant: the middle.
    ("AACCGGTT", "AACCGGTT", 4, ("CCGG", "CCGG")),
])  # fmt: skip
def test_a_window_holds_the_variant_and_the_same_letters_round_it(
    reference: str, variant: str, window_bp: int, expected: tuple[str, str]
) -> None:
    changes = {"reference_sequence": reference, "variant_sequence": variant}
    assert kegg_problem(row(**changes), window_bp).dna == expected


def test_a_variant_longer_than_the_window_is_refused() -> None:
    message = message_of(row(reference_sequence="AACCCCTT", variant_sequence="AATT"), window_bp=3)
    assert "train.jsonl:3: its variant replaces 4 bp by 0 bp, more than task.window_bp=3 can show" in message
    assert "at least 4" in message


LETTERS = st.text("ACGT", max_size=12)


@given(prefix=LETTERS, ref=LETTERS, alt=LETTERS, suffix=LETTERS, spare=st.integers(0, 30))
def test_windows_differ_in_the_allele_of_the_whole_sequences(
    prefix: str, ref: str, alt: str, suffix: str, spare: int
) -> None:
    reference, variant = prefix + ref + suffix, prefix + alt + suffix
    allele = dna.difference(reference, variant)
    window_bp = max(1, len(allele.ref), len(allele.alt)) + spare
    windows = variant_windows(reference, variant, allele, window_bp)
    cut = dna.difference(*windows)
    assert (cut.ref, cut.alt) == (allele.ref, allele.alt)
    assert max(map(len, windows)) == min(window_bp, max(len(reference), len(variant)))


# ---------------------------------------------------------------- floor


def asked(question: str, gene: str, answer: str) -> Problem:
    return Problem("p", question, (), answer, "", {"gene": gene})


def test_the_floor_looks_up_the_question_then_the_gene_then_the_most_frequent_answer() -> None:
    floor = fit_floor([
        asked("q1", "A", "x"), asked("q1", "A", "x"), asked("q1", "A", "y"),  # q1 -> x, A -> x
        asked("q2", "B", "y"), asked("q3", "C", "z"), asked("q4", "D", "y"),  # overall: x 2, y 3, z 1 -> y
    ])  # fmt: skip
    assert floor([asked("q1", "new", "x")]) == 1.0
    assert floor([asked("new", "A", "x")]) == 1.0
    assert floor([asked("new", "new", "Y ")]) == 1.0  # compared as the answer reward compares
    # Right, right, wrong (q1 -> x), wrong (C -> z): 2 of 4.
    held_out = [asked("q3", "C", "z"), asked("q9", "B", "y"), asked("q1", "A", "y"), asked("q9", "C", "x")]
    assert floor(held_out) == 0.5


# ---------------------------------------------------------------- real rows


@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason="the real rows are not beside this checkout")
@pytest.mark.parametrize("split", ["train", "validation"])
def test_real_rows_load_whole_and_their_demonstrations_are_well_formed(split: str) -> None:
    problems = read_problems(str(REAL_ROWS / f"{split}.jsonl"), split, None)
    assert len(problems) == 100
    assert all(len(sequence) >= 4_000 for problem in problems for sequence in problem.dna)
    assert all(parse_completion(problem.demonstration) for problem in problems)
    assert all(problem.facts["gene"] for problem in problems)
    assert len(problems[0].dna[0]) == 4001  # an SNV: the variant is in the middle
    assert dna.difference(*problems[0].dna).offset == 2000


@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason="the real rows are not beside this checkout")
def test_a_lookup_of_the_text_answers_most_real_questions() -> None:
    train = read_problems(str(REAL_ROWS / "train.jsonl"), "train", None)
    validation = read_problems(str(REAL_ROWS / "validation.jsonl"), "validation", None)
    assert fit_floor(train)(validation) == 0.75
