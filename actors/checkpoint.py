"""Checkpoints of a run: one directory each, complete or absent.

    checkpoints/grpo-000025/
        state.pkl       phase, version, source of problems, buffer (finished and begun groups, ledger), results
        deepspeed/      optimizer, weights and random state of every learner rank
        complete.json   written last: phase, version, the checksum of state.pkl, and the size of every file

A checkpoint is written beside its place and renamed into it, so that a kill at any moment leaves the ones before it.
Only files that this project wrote are unpickled: a run directory is as trusted as the code that made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.errors import CheckpointError
from rlsys.pipeline.buffer import BufferSnapshot
from rlsys.report.records import Phase

_NAME = re.compile(rf"(?P<phase>{'|'.join(Phase)})-(?P<version>\d{{6,}})")


@dataclass(frozen=True)
class GrpoState:
    """What the GRPO phase needs to go on."""

    buffer: BufferSnapshot
    source: Mapping[str, Any]
    """Of the problems."""
    lengths: Mapping[str, Any]
    """Of the log of lengths."""
    alarms: Mapping[str, Any]


@dataclass(frozen=True)
class RunState:
    """What a run needs to go on, beside the learner's own state."""

    phase: Phase
    version: int
    """The learner's policy version in this phase."""
    grpo: GrpoState | None
    """None before the first GRPO step."""
    evaluations: Mapping[str, Mapping[str, Any]]
    totals: Mapping[str, float]
    """Running totals of the summary: seconds, tokens, staleness sums."""


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".writing-*"):
            shutil.rmtree(leftover)

    async def save(self, state: RunState, save_learner: Callable[[Path], Awaitable[None]]) -> Path:
        """Write a checkpoint; when this returns it survives a kill. Older ones beyond `keep` are removed."""
        name = f"{state.phase}-{state.version:06d}"
        writing = self._directory / f".writing-{name}"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        await save_learner(writing)
        data = pickle.dumps(state)
        _write(writing / "state.pkl", data)
        marker = {
            "phase": state.phase,
            "version": state.version,
            "sha256": hashlib.sha256(data).hexdigest(),
            "sizes": {
                str(path.relative_to(writing)): path.stat().st_size
                for path in sorted(writing.rglob("*"))
                if path.is_file()
            },
        }
        _write(writing / "complete.json", json.dumps(marker).encode())
        place = self._directory / name
        shutil.rmtree(place, ignore_errors=True)
        writing.rename(place)
        for old in self._complete()[: -self._keep]:
            shutil.rmtree(old)
        return place

    def latest(self) -> tuple[Path, RunState] | None:
        """The newest checkpoint, or None where there is none yet. Raises CheckpointError when it is damaged."""
        found = self._complete()
        if not found:
            return None
        place = found[-1]
        try:
            return place, _read_state(place)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{place}: the checkpoint is damaged ({error}); remove this directory to go on from the one before"
            ) from error

    def _complete(self) -> list[Path]:
        """Directories of complete checkpoints, oldest first: SFT before GRPO, then by version.

        What has another name is somebody's copy, and left alone.
        """
        named = [(path, _NAME.fullmatch(path.name)) for path in self._directory.iterdir()]
        order = {
            path: (list(Phase).index(Phase(name["phase"])), int(name["version"]))
            for path, name in named
            if name and (path / "complete.json").exists()
        }
        return sorted(order, key=lambda path: order[path])


def _read_state(place: Path) -> RunState:
    """The state of a checkpoint whose files are all there. Raises ValueError and other errors where they are not."""
    marker = json.loads((place / "complete.json").read_text())
    for name, size in marker["sizes"].items():
        found = (place / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes and was written with {size}")
    data = (place / "state.pkl").read_bytes()
    if hashlib.sha256(data).hexdigest() != marker["sha256"]:
        raise ValueError("state.pkl does not have the checksum that was written with it")
    try:
        return pickle.loads(data)
    except (AttributeError, ImportError) as error:
        raise ValueError(f"state.pkl was written by another version of rlsys: {error}") from error


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
