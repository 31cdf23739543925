"""From a configured task to problems that fit the models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from rlsys.config import KeggTask, VariantConsequenceTask
from rlsys.data.prompts import OverLongPromptError, PromptRenderer
from rlsys.errors import DataError
from rlsys.models.tiny_bpe import train_bpe_tokenizer
from rlsys.tasks.loading import LearnerRoom, fit_task, load_task

TOKENIZER = train_bpe_tokenizer([], 300)


class Letters:
    """An encoder of one letter to a position."""

    def num_positions(self, sequence: str) -> int:
        return len(sequence)

    def key(self, sequence: str) -> str:
        return sequence


def renderer(max_prompt_tokens: int) -> PromptRenderer:
    return PromptRenderer(TOKENIZER, Letters(), max_prompt_tokens)


def kegg_row(question: str, context: str, answer: str = "melanoma") -> dict[str, str]:
    return {
        "question": question,
        "answer": answer,
        "reasoning": "Step 1.",
        "reference_sequence": f"{context}C{context}",
        "variant_sequence": f"{context}T{context}",
    }


SPLITS = {
    "train": [kegg_row("q1", "AC"), kegg_row("q2", "A" * 20, "glioma")],
    "validation": [kegg_row("q1", "GG"), kegg_row("q5", "AC")],
    "test": [kegg_row("q3", "TT"), kegg_row("q4", "A" * 30)],
}


def task(folder: Path, splits: Mapping[str, list[dict[str, str]]] = SPLITS, **changes: object) -> KeggTask:
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {split: str(folder / f"{split}.jsonl") for split in splits}
    return KeggTask.model_validate({"kind": "kegg", **paths, **changes})


def test_a_kegg_task_has_the_three_splits_and_the_floor_of_its_training_split(tmp_path: Path) -> None:
    data = load_task(task(tmp_path), seed=0)
    assert {split: [problem.problem_id for problem in problems] for split, problems in data.splits.items()} == {
        "train": ["train:1", "train:2"],
        "validation": ["validation:1", "validation:2"],
        "test": ["test:1", "test:2"],
    }
    # No test question is in train; the most frequent answer there is melanoma (the first of two equals).
    assert data.floor(data.splits["test"]) == 1.0


def test_held_out_problems_that_training_has_seen_are_counted(tmp_path: Path) -> None:
    # validation repeats the question q1 and the sequences of AC; test repeats neither.
    assert load_task(task(tmp_path), seed=0).counts == {
        "validation_sequences_in_train": 1,
        "validation_questions_in_train": 1,
        "test_sequences_in_train": 0,
        "test_questions_in_train": 0,
    }


def test_the_window_of_the_configuration_is_cut(tmp_path: Path) -> None:
    data = load_task(task(tmp_path, window_bp=3), seed=0)
    assert data.splits["test"][1].dna == ("ACA", "ATA")


def test_the_variant_task_makes_as_many_problems_as_configured() -> None:
    small = VariantConsequenceTask(kind="variant_consequence", train_problems=9, validation_problems=6, test_problems=3)
    data = load_task(small, seed=0)
    assert {split: len(problems) for split, problems in data.splits.items()} == {"train": 9, "validation": 6, "test": 3}
    assert 0 < data.floor(data.splits["train"]) < 1


def test_problems_that_fit_are_left_as_they_are(tmp_path: Path) -> None:
    data = load_task(task(tmp_path), seed=0)
    fitted = fit_task(data, renderer(500))
    assert (fitted.splits, fitted.counts) == (data.splits, data.counts)


def test_an_over_long_problem_is_an_error_that_names_it(tmp_path: Path) -> None:
    # Two sequences of 61 letters with their markers are 126 tokens; of 41, 86.
    with pytest.raises(OverLongPromptError, match="problem test:2"):
        fit_task(load_task(task(tmp_path), seed=0), renderer(140))


def test_over_long_problems_are_left_out_and_counted_where_the_configuration_says_so(tmp_path: Path) -> None:
    fitted = fit_task(load_task(task(tmp_path, over_long="drop"), seed=0), renderer(140))
    assert [problem.problem_id for problem in fitted.splits["test"]] == ["test:1"]
    assert {name: count for name, count in fitted.counts.items() if "over_long" in name} == {"test_over_long": 1}


def test_a_split_of_which_nothing_fits_is_an_error_in_any_case(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task\.over_long=drop leaves none of the 2 train problems"):
        fit_task(load_task(task(tmp_path, over_long="drop"), seed=0), renderer(20))


def test_a_training_prompt_must_fit_a_row_together_with_what_follows_it(tmp_path: Path) -> None:
    data = load_task(task(tmp_path), seed=0)
    plain = renderer(500)
    prompts = [len(plain.render(problem).token_ids) for problem in data.splits["train"]]
    demonstrations = [len(plain.demonstration_ids(problem)) for problem in data.splits["train"]]
    longest = max(map(sum, zip(prompts, demonstrations, strict=True)))
    assert prompts[1] > prompts[0] + 50  # so the second training problem is the one that does not fit
    fit_task(data, plain, LearnerRoom(longest, max_new_tokens=1, has_demonstrations=True))
    with pytest.raises(
        OverLongPromptError, match=rf"train:2.* {prompts[1]} tokens and its demonstration {demonstrations[1]}"
    ):
        fit_task(data, plain, LearnerRoom(longest - 1, max_new_tokens=1, has_demonstrations=True))
    fit_task(data, plain, LearnerRoom(prompts[1] + 9, max_new_tokens=9, has_demonstrations=False))
    with pytest.raises(OverLongPromptError, match=rf"train:2.* {prompts[1]} tokens and rollout\.max_new_tokens 9"):
        fit_task(data, plain, LearnerRoom(prompts[1] + 8, max_new_tokens=9, has_demonstrations=False))


def test_the_training_split_must_fit_the_learner_wherever_it_stands(tmp_path: Path) -> None:
    data = load_task(task(tmp_path), seed=0)
    last = replace(data, splits={split: data.splits[split] for split in ("test", "validation", "train")})
    with pytest.raises(OverLongPromptError, match="train:1"):
        fit_task(last, renderer(500), LearnerRoom(1, max_new_tokens=1, has_demonstrations=False))


def test_held_out_prompts_are_never_in_a_row(tmp_path: Path) -> None:
    data = load_task(task(tmp_path), seed=0)
    plain = renderer(500)
    longest = max(len(plain.render(problem).token_ids) for problem in data.splits["train"])
    assert len(plain.render(data.splits["test"][1]).token_ids) > longest + 1
    fit_task(data, plain, LearnerRoom(longest + 1, max_new_tokens=1, has_demonstrations=False))


def test_what_is_wrong_with_a_problem_beside_its_length_is_never_dropped(tmp_path: Path) -> None:
    splits = {**SPLITS, "test": [kegg_row("q<|im_end|>", "AC")]}
    with pytest.raises(DataError, match="special token"):
        fit_task(load_task(task(tmp_path, splits, over_long="drop"), seed=0), renderer(500))
