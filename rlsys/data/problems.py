"""Data files -> rows with an address: JSON lines, Parquet, a folder or a Hugging Face Hub name.

Stands before the tasks that are read from files; a task turns rows into problems. The one invariant: a row knows where
it came from (`train.jsonl:17`), so that every later complaint about it can say so.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from rlsys.errors import DataError
from rlsys.types import Problem

_HUB_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*/[A-Za-z0-9_-][\w.-]*")
_LOOKS_LIKE_A_FILE = re.compile(r"\.[A-Za-z]+\d?$")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Row(NamedTuple):
    """One row of a data file, not checked yet."""

    where: str
    """Address for people: `train.jsonl:17`, counted from 1."""
    default_id: str
    """Problem id of a row that has no `id` column: file stem and row number, `train:17`."""
    columns: Mapping[str, object]

    def text(self, name: str) -> str:
        """The column `name`, which must be there and be text. Raises DataError."""
        if name not in self.columns:
            raise DataError(
                f"{self.where}: no column {name!r}; the row has {', '.join(map(str, self.columns)) or 'no columns'}."
            )
        value = self.columns[name]
        if not isinstance(value, str):
            raise DataError(f"{self.where}: column {name!r} is {_kind(value)}, not text: {_shortened(value)}")
        if _SURROGATE.search(value):
            raise DataError(f"{self.where}: column {name!r} holds half of a surrogate pair, which is no character.")
        return value

    def problem_id(self) -> str:
        """The `id` column (text or a whole number) where there is one, else the default. Raises DataError."""
        value = self.columns.get("id")
        if value is None:
            return self.default_id
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self.text("id")


def read_rows(source: str, split: str) -> Iterator[Row]:
    """Yield the rows of a `.jsonl` or `.parquet` file, or of the `split` of a dataset's folder or Hub name.

    Raises DataError where the source cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return _read_dataset(source, split)
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise DataError(f"{source}: no such file; give a .jsonl or .parquet file, or a Hugging Face Hub name.")
        return _read_json_lines(path) if path.suffix == ".jsonl" else _read_parquet(path)
    if path.exists() or _LOOKS_LIKE_A_FILE.search(path.name):
        raise DataError(
            f"{source}: a file ending in {path.suffix or 'nothing'!r} cannot be read; "
            "use .jsonl (one JSON object in each line) or .parquet."
        )
    if _HUB_NAME.fullmatch(source):
        return _read_dataset(source, split)
    raise DataError(
        f"{source}: no such file or folder, and not a Hugging Face Hub name (owner/name) either; "
        "give a .jsonl or .parquet file."
    )


def unique_problems(numbered: Iterable[tuple[Row, Problem]], source: str) -> tuple[Problem, ...]:
    """Collect problems whose ids are all different, at least one. Raises DataError that names both rows."""
    seen: dict[str, str] = {}
    problems: list[Problem] = []
    for row, problem in numbered:
        if problem.problem_id in seen:
            raise DataError(
                f"{row.where}: the problem id {problem.problem_id!r} was already given in {seen[problem.problem_id]}; "
                "ids must be unique in a file."
            )
        seen[problem.problem_id] = row.where
        problems.append(problem)
    if not problems:
        raise DataError(f"{source}: the dataset is empty, so there is nothing to learn or to evaluate.")
    return tuple(problems)


def _read_json_lines(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Row(f"{path}:{number}", f"{path.stem}:{number}", _json_object(line, f"{path}:{number}"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _json_object(line: bytes, where: str) -> Mapping[str, object]:
    try:
        text = line.decode("utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start} of the line); save the file as UTF-8.") from error
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}: {_shortened(text)}") from error
    except RecursionError as error:
        raise DataError(f"{where}: not usable JSON: nested too deeply.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: {_kind(value)}, not a JSON object with columns: {_shortened(value)}")
    return cast(dict[str, object], value)


def _read_parquet(path: Path) -> Iterator[Row]:
    pyarrow: Any = importlib.import_module("pyarrow")  # ships no types
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        rows: list[dict[str, object]] = parquet.read_table(path, partitioning=None).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        first_line = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a readable Parquet file: {first_line} Is the download complete?") from error
    return _numbered(rows, str(path), path.stem)


def _read_dataset(name: str, split: str) -> Iterator[Row]:
    datasets: Any = importlib.import_module("datasets")  # a second to import, and ships no types
    try:
        rows: Iterable[dict[str, object]] = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).partition("\n")[0]
        raise DataError(
            f"{name}: the dataset's split {split!r} could not be loaded: {first_line}\n"
            "Check the name and the network, or download it elsewhere and give the path of its .jsonl or .parquet file."
        ) from error
    return _numbered(rows, f"{name} ({split})", f"{name.rstrip('/').rpartition('/')[2]}-{split}")


def _numbered(rows: Iterable[dict[str, object]], address: str, stem: str) -> Iterator[Row]:
    return (Row(f"{address}:{number}", f"{stem}:{number}", row) for number, row in enumerate(rows, start=1))


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "an object"


def _shortened(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
