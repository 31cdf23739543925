"""Rollout workers are killed in the midst of a run on the real parts: it goes on, with others in their place."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.runs.helpers import TINY, BackgroundRun, metrics, steps, summary


def kill_one(run: BackgroundRun, name: str) -> None:
    """One of the run's processes whose title holds `name`."""
    found = [one for one in run.remember() if name in " ".join(one.cmdline())]
    assert len(found) == 2, [one.cmdline() for one in run.remember()]
    found[0].kill()


@pytest.mark.slow
def test_a_run_outlives_its_rollout_workers(tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    two = ["rollout.workers=2", "rollout.cpus=0.5", "grpo.steps=4000", "checkpoint.every_steps=10000"]
    with BackgroundRun("train", str(TINY), *two, "--runs", str(tmp_path), log=tmp_path / "log") as run:
        run.wait_for_step(path, 3)
        kill_one(run, "VLLM::EngineCore")
        run.wait_for_output("has taken its place")
        kill_one(run, "ray::RolloutWorker")
        run.wait_for_output("has taken its place", times=2)
        run.wait_for_step(path, steps(path, "grpo")[-1] + 5)
        assert run.end_by(signal.SIGINT) == 130
        assert run.survivors() == []
    told = run.log.read_text()
    assert told.count("LOST") == 2
    assert "Traceback" not in told
    grpo = [line for line in metrics(path) if line["phase"] == "grpo"]
    assert [line["step"] for line in grpo] == list(range(1, len(grpo) + 1))
    assert max(line["staleness/max"] for line in grpo) == 1
    assert summary(path)["status"] == "interrupted"
