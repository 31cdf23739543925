"""Checkpoints: complete or absent, newest first, damaged ones refused by name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.checkpoint import Checkpoints, RunState
from rlsys.errors import CheckpointError
from rlsys.report.records import Phase


def state(phase: Phase, version: int) -> RunState:
    return RunState(phase, version, None, {}, {})


async def save_learner(directory: Path) -> None:
    (directory / "learner").write_text("weights")


def save(checkpoints: Checkpoints, phase: Phase, version: int) -> Path:
    return asyncio.run(checkpoints.save(state(phase, version), save_learner))


def test_the_newest_checkpoint_is_found_and_older_ones_are_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for phase, version in [(Phase.SFT, 100), (Phase.GRPO, 2), (Phase.GRPO, 10)]:
        save(checkpoints, phase, version)
    found = checkpoints.latest()
    assert found is not None
    assert (found[0].name, found[1].version) == ("grpo-000010", 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grpo-000002", "grpo-000010"]
    assert (found[0] / "learner").read_text() == "weights"


def test_a_checkpoint_that_was_not_finished_is_as_if_it_had_not_begun(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, Phase.GRPO, 1)

    async def killed(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(checkpoints.save(state(Phase.GRPO, 2), killed))
    found = Checkpoints(tmp_path, keep=2).latest()
    assert found is not None
    assert found[1].version == 1
    assert [path.name for path in tmp_path.iterdir()] == ["grpo-000001"]


def test_a_damaged_checkpoint_is_refused_with_its_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    place = save(checkpoints, Phase.GRPO, 1)
    data = bytearray((place / "state.pkl").read_bytes())
    data[len(data) // 2] ^= 1
    (place / "state.pkl").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"grpo-000001.*damaged"):
        checkpoints.latest()


def test_there_is_nothing_to_find_in_a_new_run(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints", keep=2).latest() is None
