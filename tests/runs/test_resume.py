"""A run that is killed or interrupted, and resumed, on the real parts."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.runs.helpers import TINY, BackgroundRun, rlsys, steps, summary


@pytest.mark.slow
def test_a_run_survives_kill_9_and_tells_each_step_once(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    with BackgroundRun("train", str(TINY), "grpo.steps=400", "--runs", str(tmp_path), log=tmp_path / "log") as first:
        first.wait_for_step(run, 5)
        first.end_by(signal.SIGKILL)
        # Ray's own agents notice only after a while that their raylet is gone, and end by themselves.
        assert first.survivors(but="Agent") == []
    killed_at = steps(run, "grpo")[-1]

    last = rlsys("train", "--resume", str(run), f"grpo.steps={killed_at + 4}")
    assert last.returncode == 0, last.stdout + last.stderr
    assert "Resuming after grpo step" in last.stdout
    assert steps(run, "grpo") == list(range(1, killed_at + 5))
    found = summary(run)
    assert found["status"] == "finished"
    assert found["steps"] == killed_at + 4
    assert found["staleness"]["max"] <= 1
    tokens = found["tokens"]
    assert tokens["generated"] == tokens["trained"] + tokens["in_flight"] + sum(tokens["discarded"].values())


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    with BackgroundRun("train", str(TINY), "grpo.steps=400", "--runs", str(tmp_path), log=tmp_path / "log") as first:
        first.wait_for_step(run, 3)
        assert first.end_by(signal.SIGINT) == 130
        assert first.survivors() == []
        told = first.log.read_text()
    assert f"rlsys train --resume {run}" in told
    assert "Traceback" not in told
    assert summary(run)["status"] == "interrupted"


@pytest.mark.slow
def test_sft_alone_can_be_continued_with_grpo(tmp_path: Path) -> None:
    done = rlsys("sft", str(TINY), "--runs", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "tiny"
    assert (steps(run, "sft"), steps(run, "grpo")) == (list(range(1, 7)), [])
    resumed = rlsys("train", "--resume", str(run), "grpo.steps=2")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (steps(run, "sft"), steps(run, "grpo")) == (list(range(1, 7)), [1, 2])
