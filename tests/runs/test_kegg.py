"""The KEGG path on rows that the test writes: LoRA, two learner ranks, a byte-level tokenizer, whole sequences; and on
the real rows, where they lie beside the checkout."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rlsys.models.policy import load_policy
from tests.runs.helpers import metrics, rlsys, steps, summary

CONFIG = Path(__file__).parents[2] / "configs" / "kegg_tiny.yaml"
REAL = Path(__file__).parents[3] / "shared" / "data" / "kegg"
DISEASES = ["Parkinson disease", "melanoma", "thyroid cancer"]


def write_rows(path: Path, number: int, seed: int) -> Path:
    """Rows in the columns of wanglab/kegg: 601 bp with one changed nucleotide in the middle."""
    chance = random.Random(seed)
    lines: list[str] = []
    for _ in range(number):
        reference = "".join(chance.choices("ACGT", k=601))
        changed = chance.choice([letter for letter in "ACGT" if letter != reference[300]])
        lines.append(
            json.dumps(
                {
                    "question": f"Network: GENE{chance.randint(1, 9)}* -> AKT. Which disease does this allele cause?",
                    "answer": chance.choice(DISEASES),
                    "reasoning": f"Step 1: {reference[300]}>{changed}.\nStep 2: it follows.",
                    "reference_sequence": reference,
                    "variant_sequence": reference[:300] + changed + reference[301:],
                }
            )
        )
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_lora_on_two_ranks_trains_on_kegg_rows_and_its_policy_can_be_evaluated(tmp_path: Path) -> None:
    data = [
        f"task.{split}={write_rows(tmp_path / f'{split}.jsonl', 12, seed)}"
        for seed, split in enumerate(["train", "validation", "test"])
    ]
    small = [
        "cluster.dashboard=false",
        "policy.vocabulary=400",
        "policy.hidden_size=64",
        "policy.attention_heads=2",
        "rollout.max_new_tokens=16",
        "evaluation.problems=4",
        "rollout.kv_cache_gb=0.1",
    ]
    done = rlsys(
        "train",
        str(CONFIG),
        *data,
        *small,
        "policy.lora={rank: 4}",
        "learner.ranks=2",
        "learner.cpus=0.5",
        "learner.zero_stage=2",
        "rewards.allele={kind: allele}",
        "--runs",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "kegg_tiny"
    assert summary(run)["status"] == "finished"
    assert (steps(run, "sft"), steps(run, "grpo")) == ([1, 2, 3, 4], [1, 2, 3, 4])
    load_policy(run / "policy")
    # Of a prompt's four completions, three find its blocks in the cache.
    assert metrics(run)[-1]["rollout/prefix_cache_hit_fraction"] > 0.5
    evaluated = rlsys("evaluate", str(CONFIG), *data, *small, "--policy", str(run / "policy"))
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert "floor" in evaluated.stdout


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not beside the checkout")
def test_real_kegg_rows_with_whole_sequences_train(tmp_path: Path) -> None:
    data = [
        f"task.train={REAL}/train.jsonl",
        f"task.validation={REAL}/validation.jsonl",
        f"task.test={REAL}/validation.jsonl",
    ]
    done = rlsys("train", str(CONFIG), *data, "cluster.dashboard=false", "--runs", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path / "kegg_tiny")["steps"] == 4
