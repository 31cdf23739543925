"""Metrics reach every place that is configured; Weights & Biases offline where there is no key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.trackers import Trackers
from rlsys.config_file import load_config
from rlsys.report.records import Phase, RunDirectory
from tests.runs.helpers import TINY


class RecordingCluster:
    """Remembers what the dashboard would show."""

    def __init__(self) -> None:
        self.exported: dict[str, float] = {}

    def export_metrics(self, metrics: Mapping[str, float]) -> None:
        self.exported |= metrics


def track(path: Path, overrides: list[str]) -> RecordingCluster:
    config = load_config(TINY, overrides)
    cluster: Any = RecordingCluster()
    trackers = Trackers(config, RunDirectory.create(path, config), cluster)
    trackers.log(Phase.GRPO, 1, {"train/loss": 0.5})
    trackers.close()
    return cluster


def test_a_step_is_a_line_and_shows_on_the_dashboard(tmp_path: Path) -> None:
    cluster = track(tmp_path / "run", [])
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {
        "phase": "grpo",
        "step": 1,
        "train/loss": 0.5,
    }
    assert cluster.exported == {"train/loss": 0.5}


def test_without_a_key_weights_and_biases_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    track(tmp_path / "run", ["logging.wandb_project=rlsys-test"])
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
