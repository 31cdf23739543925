"""The learning claim of the README, on the shipped quickstart: slow, and run by continuous integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.helpers import metrics, rlsys, summary

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.slow
def test_grpo_lifts_held_out_accuracy_from_a_stopped_warm_start(tmp_path: Path) -> None:
    done = rlsys("train", str(QUICKSTART), "--runs", str(tmp_path), timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "quickstart"
    found = summary(run)
    before, after = found["evaluation"]["after_sft"], found["evaluation"]["after_grpo"]
    assert (before["n"], after["n"]) == (300, 300)
    assert before["accuracy"] <= 0.65
    assert after["accuracy"] >= 0.90
    assert before["interval"][1] < after["interval"][0]
    assert after["greedy_accuracy"] >= before["greedy_accuracy"]
    assert before["floor"] < 0.15
    assert found["staleness"]["max"] <= found["staleness"]["bound"]
    assert found["time"]["learner_idle_fraction"] < 1
    grpo = [line for line in metrics(run) if line["phase"] == "grpo"]
    assert sum("time/weight_load_seconds" in line for line in grpo) >= len(grpo) - 1
    assert max(line["train/mismatch_abs_mean"] for line in grpo if "train/mismatch_abs_mean" in line) <= 1e-4
