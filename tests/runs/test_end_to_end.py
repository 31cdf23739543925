"""One run on the real parts (Ray, vLLM, DeepSpeed), at its smallest, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlsys.models.dna_llm import DnaLlm
from rlsys.models.encoders import EsmEncoder
from rlsys.models.policy import load_policy, load_tokenizer
from tests.runs.helpers import TINY, BackgroundRun, metrics, rlsys, steps, summary


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two rollout workers."""
    folder = tmp_path_factory.mktemp("runs")
    with BackgroundRun(
        "train", str(TINY), "rollout.workers=2", "rollout.cpus=0.5", "--runs", str(folder), log=folder / "log"
    ) as background:
        background.wait_for_step(folder / "tiny", 1)
        assert background.wait_for_end() == 0, background.log.read_text()
        assert background.survivors() == []
    return folder / "tiny"


def test_the_summary_has_every_key_and_its_tokens_reconcile(run: Path) -> None:
    found = summary(run)
    assert found["status"] == "finished"
    assert found["steps"] == 8
    assert set(found["evaluation"]) == {"after_sft", "after_grpo"}
    assert set(found["evaluation"]["after_grpo"]) >= {"accuracy", "greedy_accuracy", "n", "interval", "floor"}
    assert set(found["time"]) >= {"learner_idle_fraction", "rollout_idle_fraction", "weight_load_seconds_mean"}
    assert set(found["throughput"]) >= {
        "trajectories_per_second",
        "trained_tokens_per_second",
        "generated_tokens_per_second",
    }
    tokens = found["tokens"]
    assert tokens["generated"] == tokens["trained"] + tokens["in_flight"] + sum(tokens["discarded"].values())


def test_staleness_keeps_its_bound_and_is_used(run: Path) -> None:
    staleness = summary(run)["staleness"]
    assert staleness["max"] == staleness["bound"] == 1


def test_engine_and_learner_agree_at_equal_version(run: Path) -> None:
    mismatches = [line["train/mismatch_abs_mean"] for line in metrics(run) if "train/mismatch_abs_mean" in line]
    assert mismatches
    assert max(mismatches) < 1e-4


def test_every_step_loads_weights_and_is_written_down_once(run: Path) -> None:
    assert steps(run, "sft") == list(range(1, 7))
    assert steps(run, "grpo") == list(range(1, 9))
    loads = [line for line in metrics(run) if line.get("time/weight_load_seconds", 0) > 0]
    assert len(loads) >= 7  # the last load ends after the last line


def test_a_trajectory_can_be_read(run: Path) -> None:
    first = json.loads((run / "trajectories.jsonl").read_text().splitlines()[0])
    assert {"question", "completion", "reward", "parts", "version_spans", "advantage"} <= set(first)


def test_the_final_policy_loads_in_transformers_and_is_not_the_first_one(run: Path) -> None:
    first, last = load_policy(run / "models" / "policy"), load_policy(run / "policy")
    assert isinstance(last, DnaLlm)
    changed = [
        not torch.equal(a, b) for a, b in zip(first.projector.parameters(), last.projector.parameters(), strict=True)
    ]
    assert any(changed), "the projector is trained and carried over"
    assert load_tokenizer(run / "policy").eos_token == "<|im_end|>"


@pytest.mark.slow
def test_generate_answers_a_problem_given_as_json(run: Path) -> None:
    question = json.loads((run / "trajectories.jsonl").read_text().splitlines()[0])["question"]
    problem = json.dumps({"problem_id": "mine", "question": question, "dna": ["ATGGCTTGC", "ATGGATTGC"]})
    result = rlsys(
        "generate",
        str(run / "policy"),
        "-",
        "--max-new-tokens",
        "24",
        "--samples",
        "2",
        "--temperature",
        "1",
        stdin=problem,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["problem_id"] for line in lines] == ["mine", "mine"]


def test_the_encoder_of_a_policy_is_named_in_its_configuration(run: Path) -> None:
    described = json.loads((run / "policy" / "config.json").read_text())["encoder"]
    assert described["id"] == EsmEncoder(run / "models" / "encoder").encoder_id
