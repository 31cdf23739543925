"""The run directory: nothing overwritten, nothing told twice, nothing half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import Config
from rlsys.config_file import parse_config
from rlsys.errors import CheckpointError, ConfigError
from rlsys.report.records import Phase, RunDirectory, trajectory_record
from rlsys.types import (
    Completion,
    FinishReason,
    PartScore,
    PartStatus,
    Problem,
    Prompt,
    Score,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
)


@pytest.fixture
def config() -> Config:
    return parse_config({
        "name": "test",
        "task": {"kind": "variant_consequence"},
        "policy": {"kind": "tiny"},
        "encoder": {"kind": "tiny"},
        "grpo": {"steps": 3, "learning_rate": 1e-6},
        "rewards": {"answer": {"kind": "answer"}},
    }, "test")  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, config: Config) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs" / "test", config)


def lines(run: RunDirectory, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / name).read_text().splitlines()]


# ---------------------------------------------------------------- create, open


def test_a_new_directory_holds_the_configuration_that_repeats_the_run(run: RunDirectory, config: Config) -> None:
    assert RunDirectory.open(run.path).config() == config


def test_a_directory_that_exists_is_never_written_into(run: RunDirectory, config: Config) -> None:
    before = sorted(run.path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        RunDirectory.create(run.path, config)
    assert f"rlsys train --resume {run.path}" in str(caught.value)
    assert "name=..." in str(caught.value)
    assert sorted(run.path.iterdir()) == before


def test_a_directory_that_cannot_be_made_is_explained(tmp_path: Path, config: Config) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="the run directory cannot be made"):
        RunDirectory.create(tmp_path / "runs" / "test", config)


def test_a_run_that_does_not_exist_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run directory"):
        RunDirectory.open(tmp_path / "none")


def test_a_directory_of_something_else_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.yaml"):
        RunDirectory.open(tmp_path)


def test_a_configuration_that_was_spoilt_by_hand_is_explained(run: RunDirectory) -> None:
    (run.path / "config.yaml").write_text("name: x\ngrpo: {stepz: 1}\n")
    with pytest.raises(ConfigError, match=r"did you mean grpo\.steps"):
        run.config()


# ---------------------------------------------------------------- lines


def test_each_step_is_one_line_of_json(run: RunDirectory) -> None:
    run.append_metrics(Phase.SFT, 1, {"train/loss": 2.5})
    run.append_metrics(Phase.GRPO, 1, {"reward/answer": np.float32(0.5), "staleness/max": np.int64(1)})  # pyright: ignore
    assert lines(run) == [
        {"phase": "sft", "step": 1, "train/loss": 2.5},
        {"phase": "grpo", "step": 1, "reward/answer": 0.5, "staleness/max": 1},
    ]


def test_what_is_not_finite_becomes_null(run: RunDirectory) -> None:
    run.append_metrics(Phase.GRPO, 1, {"a": float("nan"), "b": float("inf")})
    assert lines(run) == [{"phase": "grpo", "step": 1, "a": None, "b": None}]


def test_rewinding_takes_out_what_came_after_the_checkpoint(run: RunDirectory) -> None:
    for phase, step in [(Phase.SFT, 1), (Phase.SFT, 9), (Phase.GRPO, 1), (Phase.GRPO, 2), (Phase.GRPO, 3)]:
        run.append_metrics(phase, step, {})
        run.append_trajectories(phase, step, [{"n": 1}, {"n": 2}])
    run.rewind(Phase.GRPO, 2)
    kept = [("sft", 1), ("sft", 9), ("grpo", 1), ("grpo", 2)]
    assert [(line["phase"], line["step"]) for line in lines(run)] == kept
    assert [(line["phase"], line["step"]) for line in lines(run, "trajectories.jsonl")] == [
        place for place in kept for _ in range(2)
    ]


def test_rewinding_into_the_warm_start_takes_out_the_later_phase(run: RunDirectory) -> None:
    run.append_metrics(Phase.SFT, 5, {})
    run.append_metrics(Phase.GRPO, 1, {})
    run.rewind(Phase.SFT, 5)
    assert [line["phase"] for line in lines(run)] == ["sft"]


def test_rewinding_to_the_very_beginning_empties_the_files(run: RunDirectory) -> None:
    run.append_metrics(Phase.SFT, 1, {})
    run.rewind(Phase.SFT, 0)
    assert lines(run) == []


def test_a_line_that_was_cut_off_by_a_kill_is_taken_out(run: RunDirectory) -> None:
    run.append_metrics(Phase.GRPO, 1, {"a": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "grpo", "step": 2, "a"')
    run.rewind(Phase.GRPO, 2)
    run.append_metrics(Phase.GRPO, 3, {"a": 3})
    assert [line["step"] for line in lines(run)] == [1, 3]


def test_a_damaged_line_in_the_middle_is_named(run: RunDirectory) -> None:
    run.append_metrics(Phase.GRPO, 1, {})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("spoilt\n")
    run.append_metrics(Phase.GRPO, 2, {})
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not a line that a run wrote"):
        run.rewind(Phase.GRPO, 1)


# ---------------------------------------------------------------- summary


def test_a_summary_comes_back_and_leaves_nothing_beside_it(run: RunDirectory) -> None:
    assert run.read_summary() is None
    run.write_summary({"steps": 1})
    run.write_summary({"steps": 2, "mean": float("nan")})
    assert run.read_summary() == {"steps": 2, "mean": None}
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "checkpoints", "summary.json"}


def test_a_damaged_summary_is_explained(run: RunDirectory) -> None:
    (run.path / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"summary\.json: not a readable summary"):
        run.read_summary()


# ---------------------------------------------------------------- trajectories


def test_a_trajectory_is_told_in_readable_form(run: RunDirectory) -> None:
    completion = Completion(
        token_ids_T=np.array([5, 6, 7]),
        behavior_logprobs_T=np.zeros(3, np.float32),
        version_spans=(VersionSpan(3, 0, 2), VersionSpan(4, 2, 3)),
        text="<think>é</think>\nAnswer: x",
        finish_reason=FinishReason.STOP,
    )
    parts = {
        "answer": PartScore(1.0, PartStatus.OK),
        "mine": PartScore(float("nan"), PartStatus.TIMED_OUT, "after 5 s"),
    }
    group = TrajectoryGroup(
        ticket=9,
        problem=Problem("p1", "Which?", ("ACG", "ACGT"), "x", ""),
        prompt=Prompt("p1", (1, 2), ()),
        trajectories=(Trajectory(completion, Score(parts, float("nan"))),),
    )
    run.append_trajectories(Phase.GRPO, 7, [trajectory_record(group, 0, advantage=0.5)])
    assert lines(run, "trajectories.jsonl") == [
        {
            "phase": "grpo",
            "step": 7,
            "problem_id": "p1",
            "ticket": 9,
            "question": "Which?",
            "dna_lengths_bp": [3, 4],
            "completion": "<think>é</think>\nAnswer: x",
            "answer": "x",
            "reward": None,
            "advantage": 0.5,
            "parts": {
                "answer": {"value": 1.0, "status": "ok"},
                "mine": {"value": None, "status": "timed_out", "detail": "after 5 s"},
            },
            "tokens": 3,
            "finish_reason": "stop",
            "version_spans": [[3, 0, 2], [4, 2, 3]],
        }
    ]
    assert "é" in (run.path / "trajectories.jsonl").read_text(encoding="utf-8")


def test_evaluations_stand_at_their_versions_and_are_rewound_with_the_steps(run: RunDirectory) -> None:
    assert run.evaluated_versions(Phase.GRPO) == set()
    for version in (0, 4, 8):
        run.append_evaluation(Phase.GRPO, version, {"accuracy": 0.1 * version})
    assert run.evaluated_versions(Phase.GRPO) == {0, 4, 8}
    assert run.evaluated_versions(Phase.SFT) == set()
    run.rewind(Phase.GRPO, 7)
    assert run.evaluated_versions(Phase.GRPO) == {0, 4}
    assert lines(run, "evaluations.jsonl")[1] == {"phase": "grpo", "step": 4, "accuracy": 0.4}
