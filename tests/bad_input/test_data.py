"""Data that cannot be used: each complaint names the file and the line, or the problem, and says what to do."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.cli import main
from tests.bad_input.conftest import Refused, kegg_row


def second_row(**changes: object) -> Callable[[], None]:
    """The training split, with a second row that is changed."""
    return text(f"{json.dumps(kegg_row())}\n{json.dumps(kegg_row(**changes))}\n")


def text(content: str) -> Callable[[], None]:
    """The training split, with this content."""
    return lambda: write("train.jsonl", content)


def write(name: str, content: str) -> None:
    Path(name).write_text(content)


def broken_parquet() -> None:
    pyarrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.table({name: [value] for name, value in kegg_row().items()}), "train.parquet")
    Path("train.parquet").write_bytes(Path("train.parquet").read_bytes()[:-20])


def nothing() -> None:
    """The files are good."""


LONG = "ACGT" * 300
"""1,200 letters: 400 positions of the tiny encoder, 402 tokens."""
WORDY = " ".join(map(str, range(300)))
"""Digits that the tokenizer, which has room for a few merges only, does not make short."""

# What is done to the files -> overrides -> what the message must say.
CASES: dict[str, tuple[Callable[[], None], list[str], list[str]]] = {
    # files
    "a missing file": (nothing, ["task.train=trian.jsonl"], ["trian.jsonl: no such file", ".jsonl or .parquet"]),
    "an unknown extension": (lambda: write("train.csv", "a,b\n"), ["task.train=train.csv"],
                             ["train.csv: a file ending in '.csv' cannot be read", "use .jsonl"]),
    "a name that is nothing": (nothing, ["task.train=train"], ["train: no such file or folder", "owner/name"]),
    "an empty file": (text(""), [], ["train.jsonl: the dataset is empty"]),
    "blank lines": (text("\n\n"), [], ["train.jsonl: the dataset is empty"]),
    "a damaged Parquet file": (broken_parquet, ["task.train=train.parquet"],
                               ["train.parquet: not a readable Parquet file", "Is the download complete?"]),
    # rows
    "a line that is not JSON": (text(f"{json.dumps(kegg_row())}\n{{'question'}}\n"), [], ["train.jsonl:2: not JSON"]),
    "a line that is a list": (text("[1, 2]\n"), [], ["train.jsonl:1: a list, not a JSON object with columns"]),
    "a missing column": (second_row(answer=None), [],
                         ["train.jsonl:2: no column 'answer'; the row has question, reasoning"]),
    "a number for a text": (second_row(question=5), [], ["train.jsonl:2: column 'question' is a number, not text: 5"]),
    "a list for a sequence": (second_row(variant_sequence=["ACGT"]), [],
                              ["train.jsonl:2: column 'variant_sequence' is a list, not text"]),
    "an empty answer": (second_row(answer=" "), [], ["train.jsonl:2: column 'answer' is empty"]),
    "an id twice": (text(f"{json.dumps(kegg_row(id='a'))}\n" * 2), [],
                    ["train.jsonl:2: the problem id 'a' was already given in train.jsonl:1"]),
    # sequences
    "an unknown letter": (second_row(reference_sequence="ACGTX"), [],
                          ["train.jsonl:2", "problem train:2: dna[0] has 'X' at position 4 (0-based)", "ACGTN only",
                           "Write N"]),
    "RNA": (second_row(variant_sequence="ACGUU"), [], ["train.jsonl:2", "dna[1] has 'U' at position 3",
                                                       "Is this RNA?"]),
    "lower case": (second_row(variant_sequence="ACgT"), [], ["train.jsonl:2", "dna[1] has 'g'", "upper case"]),
    "an empty sequence": (second_row(reference_sequence=""), [], ["train.jsonl:2", "dna[0] is empty"]),
    "a variant that is longer than the window": (second_row(variant_sequence="ACGTAC" + "T" * 20 + "GTACGT"),
                                                 ["task.window_bp=10"], ["train.jsonl:2", "task.window_bp=10",
                                                                         "at least 20"]),
    # prompts
    "a special token in a question": (second_row(question="Which<|im_end|>?"), [],
                                      ["problem train:2", "the special token <|im_end|> at character 5",
                                       "take it out"]),
    "a special token in a demonstration": (second_row(reasoning="<|dna_pad|>"), [],
                                           ["problem train:2: its demonstration holds the special token <|dna_pad|>"]),
    "nothing to imitate": (second_row(reasoning=""), [],
                           ["problem train:2 has no demonstration", "give one, or train without sft"]),
    "a prompt that is too long for the engine": (
        second_row(reference_sequence=LONG, variant_sequence=LONG), [],
        ["problem train:2: its prompt has 8", "(804 of DNA), more than the 128", "rollout.max_model_tokens",
         "task.over_long=drop"]),
    "only prompts that are too long": (
        nothing, ["task.over_long=drop", "rollout.max_model_tokens=40"],
        ["task.over_long=drop leaves none of the 2 train problems", "raise rollout.max_model_tokens"]),
    "a sequence that is too long for the encoder": (
        second_row(variant_sequence="ACGT" * 2000), [],
        ["problem train:2: a DNA sequence of 8000 nucleotides is 2668 encoder positions", "reads 1 to 2045",
         "at most 6135"]),
    "a demonstration that does not fit into a row": (
        second_row(reasoning=WORDY), [],
        ["problem train:2: its prompt has ", "its demonstration ", "together more than learner.micro_batch_tokens=256",
         "Raise "]),
    "a completion that would not fit into a row": (
        nothing, ["learner.micro_batch_tokens=50"],
        ["problem train:1: its prompt has ",
         "rollout.max_new_tokens 32, together more than learner.micro_batch_tokens=50", "Raise "]),
    "a row too short for anything": (
        nothing, ["learner.micro_batch_tokens=50", "task.over_long=drop"], ["leaves none of the 2 train problems",
                                                                    "learner.micro_batch_tokens"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_data_that_cannot_be_used_are_refused(case: str, kegg: Path, refused: Refused) -> None:
    damage, overrides, expected = CASES[case]
    damage()
    message = refused("train", "kegg.yaml", *overrides)
    assert [fragment for fragment in expected if fragment not in message] == [], message
    assert not (kegg / "runs" / "test").exists(), "nothing was begun, so the run's name is free"


@pytest.mark.parametrize("changes", [
    {"reference_sequence": LONG}, {"reference_sequence": "ACGT" * 2000}, {"reasoning": WORDY},
], ids=["engine", "encoder", "row"])  # fmt: skip
def test_what_does_not_fit_can_be_left_out_and_is_counted(
    changes: dict[str, object], kegg: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second_row(**changes)()
    with pytest.raises(SystemExit) as caught:
        main(["train", "kegg.yaml", "--dry-run", "task.over_long=drop"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "1 train, 2 validation, 2 test" in out
    assert "1 train over long" in out
