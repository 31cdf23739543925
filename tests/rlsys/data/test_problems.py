"""Rows from files: every complaint says where."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlsys.data.problems import Row, read_rows, unique_problems
from rlsys.errors import DataError
from rlsys.types import Problem


def problem(problem_id: str) -> Problem:
    return Problem(problem_id, "Which?", ("ACGT",), "this", "")


def message_of(source: Path | str, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(str(source), split))
    return str(caught.value)


# ---------------------------------------------------------------- JSON lines


def test_a_row_of_json_lines_knows_its_line_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"a": "x"}\n\n{"a": "y"}\n')
    assert list(read_rows(str(file), "train")) == [
        Row(f"{file}:1", "train:1", {"a": "x"}),
        Row(f"{file}:3", "train:3", {"a": "y"}),
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "x"}\n')
    assert [row.columns for row in read_rows(str(file), "train")] == [{"a": "x"}]


@pytest.mark.parametrize(("line", "expected"), [
    (b'{"a": 1', ":2: not JSON: Expecting ',' delimiter at column 8: {\"a\": 1"),
    (b"a,b,c", ":2: not JSON: Expecting value at column 1: a,b,c"),
    (b'["x"]', ":2: a list, not a JSON object with columns"),
    (b"17", ":2: a number, not a JSON object with columns"),
    (b'{"a": "\xff"}', ":2: not UTF-8 text (byte 7 of the line)"),
    (b"[" * 100_000, ":2: not usable JSON: nested too deeply"),
])  # fmt: skip
def test_a_line_that_is_no_json_object_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'{"a": "x"}\n' + line + b"\n")
    assert f"{file}{expected}" in message_of(file)


# ---------------------------------------------------------------- Parquet


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)


def test_parquet_rows_are_numbered_from_one(tmp_path: Path) -> None:
    file = tmp_path / "kegg.parquet"
    write_parquet(file, {"a": ["x", "y"], "b": [1, None]})
    assert list(read_rows(str(file), "train")) == [
        Row(f"{file}:1", "kegg:1", {"a": "x", "b": 1}),
        Row(f"{file}:2", "kegg:2", {"a": "y", "b": None}),
    ]


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "kegg.parquet"
    write_parquet(file, {"a": ["x", "y"]})
    file.write_bytes(file.read_bytes()[:-20])
    assert f"{file}: not a readable Parquet file" in message_of(file)


def test_a_text_file_called_parquet_is_named(tmp_path: Path) -> None:
    file = tmp_path / "kegg.parquet"
    file.write_text("hello")
    assert f"{file}: not a readable Parquet file" in message_of(file)


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize(("source", "expected"), [
    ("missing.jsonl", "missing.jsonl: no such file; give a .jsonl or .parquet file"),
    ("deep/below/missing.parquet", "deep/below/missing.parquet: no such file"),
    ("data/train.csv", "data/train.csv: a file ending in '.csv' cannot be read"),
    ("train.json", "train.json: a file ending in '.json' cannot be read"),
    ("nowhere", "nowhere: no such file or folder, and not a Hugging Face Hub name"),
    ("a/b/c", "a/b/c: no such file or folder, and not a Hugging Face Hub name"),
])  # fmt: skip
def test_a_source_that_cannot_be_read_is_explained(source: str, expected: str) -> None:
    assert expected in message_of(source)


def test_a_file_without_an_extension_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train"
    file.write_text("{}\n")
    assert f"{file}: a file ending in 'nothing' cannot be read" in message_of(file)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder in the Hub's layout, which `datasets` loads without a network."""
    folder = tmp_path / "kegg"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"a": split}) + "\n")
    datasets: Any = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield str(folder)
    datasets.enable_progress_bars()


def test_a_dataset_gives_the_rows_of_the_split_that_is_asked_for(dataset: str) -> None:
    assert list(read_rows(dataset, "test")) == [Row(f"{dataset} (test):1", "kegg-test:1", {"a": "test"})]


def test_a_split_that_the_dataset_does_not_have_is_named(dataset: str) -> None:
    message = message_of(dataset, "validation")
    assert f"{dataset}: the dataset's split 'validation' could not be loaded" in message
    assert "give the path of its .jsonl or .parquet file" in message


# ---------------------------------------------------------------- columns and ids


@pytest.mark.parametrize(("columns", "expected"), [
    ({"a": "x", "b": "y"}, "f.jsonl:3: no column 'question'; the row has a, b."),
    ({}, "f.jsonl:3: no column 'question'; the row has no columns."),
    ({"question": 7}, "f.jsonl:3: column 'question' is a number, not text: 7"),
    ({"question": None}, "f.jsonl:3: column 'question' is null, not text: None"),
    ({"question": True}, "f.jsonl:3: column 'question' is true or false, not text: True"),
    ({"question": ["x"]}, "f.jsonl:3: column 'question' is a list, not text: ['x']"),
    ({"question": {"x": 1}}, "f.jsonl:3: column 'question' is an object, not text"),
    ({"question": "a\ud800"}, "f.jsonl:3: column 'question' holds half of a surrogate pair"),
])  # fmt: skip
def test_a_column_that_is_missing_or_no_text_is_named(columns: dict[str, object], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        Row("f.jsonl:3", "f:3", columns).text("question")
    assert expected in str(caught.value)


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(DataError) as caught:
        Row("f.jsonl:3", "f:3", {"question": ["x" * 5000]}).text("question")
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(("columns", "expected"), [
    ({"id": "rs123"}, "rs123"),
    ({"id": 17}, "17"),
    ({"id": None}, "f:3"),
    ({}, "f:3"),
])  # fmt: skip
def test_a_problem_is_named_by_its_id_column_or_its_place(columns: dict[str, object], expected: str) -> None:
    assert Row("f.jsonl:3", "f:3", columns).problem_id() == expected


def test_an_id_that_is_neither_text_nor_a_number_is_refused() -> None:
    with pytest.raises(DataError, match="column 'id' is true or false"):
        Row("f.jsonl:3", "f:3", {"id": True}).problem_id()


def test_two_problems_with_one_id_are_refused_with_both_places() -> None:
    rows = [(Row(f"f.jsonl:{line}", "", {}), problem(name)) for line, name in enumerate(["a", "b", "a"], start=1)]
    with pytest.raises(DataError, match=r"f\.jsonl:3: the problem id 'a' was already given in f\.jsonl:1"):
        unique_problems(rows, "f.jsonl")


def test_a_dataset_without_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl: the dataset is empty"):
        unique_problems([], "f.jsonl")
