"""The directory of a run: the resolved configuration, a line per step, readable trajectories, a summary.

    runs/<name>/
        config.yaml            read again, it repeats the run
        metrics.jsonl          {"phase": "grpo", "step": 7, "reward/answer": 0.41, ...}
        evaluations.jsonl      {"phase": "grpo", "step": 7, "accuracy": 0.52, ...}: of version 7, while training went on
        trajectories.jsonl     {"phase": "grpo", "step": 7, "problem_id": ..., "completion": ..., "parts": {...}, ...}
        checkpoints/           written by actors.checkpoint
        summary.json           written whole, when there is something to sum up

Stands at the end of every step; only the driver writes here. The one invariant: each line is one complete step,
evaluation or trajectory of the run that is told, so that lines beyond the checkpoint from which a run goes on are taken
out before it does. Every line reaches the operating system at once: a killed driver loses none.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import numpy as np

from rlsys.config import Config
from rlsys.config_file import dump_config, load_config
from rlsys.errors import CheckpointError
from rlsys.types import PartScore, TrajectoryGroup


class Phase(StrEnum):
    """The two trainings of a run, in their order; steps count from 1 in each."""

    SFT = "sft"
    GRPO = "grpo"


class RunDirectory:
    """One run's directory. Made by `create` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"
        self._evaluations = path / "evaluations.jsonl"
        self._trajectories = path / "trajectories.jsonl"
        self._summary = path / "summary.json"

    @classmethod
    def create(cls, path: Path, config: Config) -> RunDirectory:
        """Make a new directory with the resolved configuration. Raises CheckpointError when it exists."""
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            raise CheckpointError(
                f"{path} exists already, and a new run never writes into another one's directory.\n"
                f"Continue that run with `rlsys train --resume {path}`, or give this one another name (name=...)."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path}: the run directory cannot be made: {error.strerror or error}") from error
        directory = cls(path)
        directory.checkpoints.mkdir()
        _write_atomically(path / "config.yaml", dump_config(config))
        return directory

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The directory of a run that was begun. Raises CheckpointError when it is none."""
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such run directory, so there is nothing to resume.")
        if not (path / "config.yaml").is_file():
            raise CheckpointError(f"{path} has no config.yaml, so it is not the directory of a run.")
        return cls(path)

    def config(self) -> Config:
        """The run's resolved configuration. Raises ConfigError when it was changed into one that cannot be used."""
        return load_config(self.path / "config.yaml")

    def append_metrics(self, phase: Phase, step: int, metrics: Mapping[str, float]) -> None:
        """Add the line of a step; a number that is not finite becomes null."""
        _append(self._metrics, phase, step, [metrics])

    def append_evaluation(self, phase: Phase, version: int, result: Mapping[str, Any]) -> None:
        """Add the evaluation of a policy version. Such lines come later than those of the steps that went on."""
        _append(self._evaluations, phase, version, [result])

    def evaluated_versions(self, phase: Phase) -> set[int]:
        """The versions of `phase` that have a line. Raises CheckpointError when the file is damaged."""
        if not self._evaluations.exists():
            return set()
        return {version for found, version, _ in _lines(self._evaluations) if found is phase}

    def append_trajectories(self, phase: Phase, step: int, trajectories: Sequence[Mapping[str, Any]]) -> None:
        """Add a line for each record (see `trajectory_record`)."""
        _append(self._trajectories, phase, step, trajectories)

    def rewind(self, phase: Phase, step: int) -> None:
        """Take out what was written after `step` of `phase`: the run goes on from there and tells it anew.

        Raises CheckpointError when a file is damaged.
        """
        for path in (self._metrics, self._evaluations, self._trajectories):
            if path.exists():
                order = list(Phase)
                last = (order.index(phase), step)
                kept = (line for found, number, line in _lines(path) if (order.index(found), number) <= last)
                _write_atomically(path, "".join(kept))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace `summary.json`; a reader sees the old one or the new one, never a part."""
        _write_atomically(self._summary, json.dumps(_plain(summary), indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, or None where none was written yet. Raises CheckpointError when it is damaged."""
        try:
            return json.loads(self._summary.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._summary}: not a readable summary: {error}") from error


def trajectory_record(group: TrajectoryGroup, index: int, advantage: float) -> dict[str, Any]:
    """Trajectory `index` of a group in readable form: what was asked, what was written, how it was judged."""
    problem, trajectory = group.problem, group.trajectories[index]
    completion, score = trajectory.completion, trajectory.score
    return {
        "problem_id": problem.problem_id,
        "ticket": group.ticket,
        "question": problem.question,
        "dna_lengths_bp": [len(sequence) for sequence in problem.dna],
        "completion": completion.text,
        "answer": problem.answer,
        "reward": score.reward,
        "advantage": advantage,
        "parts": {name: _part_record(part) for name, part in score.parts.items()},
        "tokens": len(completion.token_ids_T),
        "finish_reason": str(completion.finish_reason),
        "version_spans": [list(span) for span in completion.version_spans],
    }


def _part_record(part: PartScore) -> dict[str, Any]:
    record: dict[str, Any] = {"value": part.value, "status": str(part.status)}
    return {**record, "detail": part.detail} if part.detail else record


def _append(path: Path, phase: Phase, step: int, records: Sequence[Mapping[str, Any]]) -> None:
    lines = (json.dumps(_plain({"phase": phase, "step": step, **record}), ensure_ascii=False) for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))


def _lines(path: Path) -> Iterator[tuple[Phase, int, str]]:
    """Phase, step and text of each whole line."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        # What stands after the last line end is left out above: the driver was killed while it wrote it.
        try:
            record = json.loads(line)
            place = Phase(record["phase"]), int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}:{number}: not a line that a run wrote, so it cannot be continued; "
                "take the line out or restore the file."
            ) from error
        yield *place, line + "\n"


def _write_atomically(path: Path, text: str) -> None:
    writing = path.with_name(f".{path.name}.writing")
    with writing.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)


def _plain(value: object) -> object:
    """JSON has no numpy numbers and no NaN: the first become Python's, the second null."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in cast(Mapping[object, object], value).items()}
        case np.generic() | np.ndarray():
            return _plain(cast(object, value.tolist()))
        case list() | tuple():
            return [_plain(item) for item in cast(Sequence[object], value)]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value
