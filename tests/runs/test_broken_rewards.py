"""Reward functions that fail or hang, in real scorers: the run goes on and counts, or stops and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.helpers import TINY, BackgroundRun, metrics, summary

pytestmark = pytest.mark.slow

QUICK = ["sft.steps=1", "evaluation.problems=2", "grpo.steps=4"]


def test_a_reward_that_always_fails_stops_the_run_with_the_reason_and_leaves_no_process(tmp_path: Path) -> None:
    function = "rewards.mine={kind: function, function: 'tests.runs.broken_rewards:raises'}"
    with BackgroundRun("train", str(TINY), *QUICK, function, "--runs", str(tmp_path), log=tmp_path / "log") as run:
        run.wait_for_output("GRPO:")
        assert run.wait_for_end() == 2
        assert run.survivors() == []
    told = (tmp_path / "log").read_text()
    assert "could not be scored" in told
    assert "RuntimeError: the oracle is down" in told
    assert "Traceback" not in told
    assert summary(tmp_path / "tiny")["status"] == "failed"


def test_a_reward_that_hangs_on_some_problems_is_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    function = (
        "rewards.mine={kind: function, function: 'tests.runs.broken_rewards:hangs_on_some', timeout_seconds: 0.2}"
    )
    with BackgroundRun(
        "train",
        str(TINY),
        *QUICK,
        function,
        "scoring.max_failed_fraction=0.6",
        "--runs",
        str(tmp_path),
        log=tmp_path / "log",
    ) as run:
        assert run.wait_for_end() == 0, run.log.read_text()
    failed = [line["reward/failed_fraction"] for line in metrics(tmp_path / "tiny") if "reward/failed_fraction" in line]
    assert 0 < max(failed) < 1
    assert summary(tmp_path / "tiny")["status"] == "finished"
