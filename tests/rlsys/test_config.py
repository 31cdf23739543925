"""The rules between keys: each refuses what cannot work, and says both numbers."""

from __future__ import annotations

from typing import Any

import pytest

from rlsys.config import Config, Section
from rlsys.config_file import parse_config
from rlsys.config_rules import refuse_changes
from rlsys.errors import ConfigError


def tree(**sections: Any) -> dict[str, Any]:
    """A complete configuration with some sections replaced."""
    complete: dict[str, Any] = {
        "name": "test",
        "task": {"kind": "variant_consequence"},
        "policy": {"kind": "tiny"},
        "encoder": {"kind": "tiny"},
        "grpo": {"steps": 1},
        "rewards": {"answer": {"kind": "answer"}},
    }
    return {**complete, **sections}


KEGG = {"kind": "kegg", "train": "a.jsonl", "validation": "b.jsonl", "test": "c.jsonl"}


@pytest.mark.parametrize(("sections", "expected"), [
    ({"task": {"kind": "variant_consequence", "window_codons": 4}},
     "task: window_codons=4 has no middle codon; use an odd number"),
    ({"rewards": {}}, "rewards: no part is named"),
    ({"rewards": {"a": {"kind": "answer", "weight": 0}, "f": {"kind": "format", "weight": 0}}},
     "rewards: every weight is 0 (a, f)"),
    ({"rewards": {"mine": {"kind": "function"}}}, "rewards.mine: kind=function with function=None"),
    ({"rewards": {"mine": {"kind": "answer", "function": "a:b"}}}, "rewards.mine: kind=answer with function=a:b"),
    ({"rollout": {"max_new_tokens": 512, "max_model_tokens": 512}},
     "rollout.max_new_tokens=512 leaves no room for a prompt in rollout.max_model_tokens=512"),
    ({"policy": {"kind": "tiny", "hidden_size": 128, "attention_heads": 3}},
     "policy.hidden_size=128 over policy.attention_heads=3 is not a multiple of 32"),
    ({"policy": {"kind": "tiny", "hidden_size": 64, "attention_heads": 4}},  # 16 for each head
     "policy.hidden_size=64 over policy.attention_heads=4 is not a multiple of 32"),
    ({"task": KEGG}, "policy.tokenizer=words knows only the words of task.kind=variant_consequence"),
    ({"learner": {"gpus": 2}}, "learner.gpus=2: a rank drives 0 or 1 GPU"),
    ({"learner": {"gpus": 0.5}}, "learner.gpus=0.5: a rank drives 0 or 1 GPU"),
    ({"rollout": {"gpus": 1.5}}, "rollout.gpus=1.5: above 1 it must be a whole number"),
    ({"rollout": {"max_new_tokens": 600}, "learner": {"micro_batch_tokens": 512}},
     "rollout.max_new_tokens=600 leaves no room for a prompt in learner.micro_batch_tokens=512"),
    ({"task": KEGG, "policy": {"kind": "tiny", "tokenizer": "bpe"}, "rewards": {"steps": {"kind": "amino_acid"}}},
     "rewards.steps.kind=amino_acid needs the amino acids of task.kind=variant_consequence, which task.kind=kegg does"),
    ({"evaluation": {"problems": 301}}, "evaluation.problems=301 is more than task.test_problems=300"),
])  # fmt: skip
def test_an_impossible_combination_is_refused_with_its_values(sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**sections), "run.yaml")
    assert expected in str(caught.value)


def test_all_impossible_combinations_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(learner={"gpus": 2}, evaluation={"problems": 301}, rewards={}), "run.yaml")
    assert [line.split(" ")[2].split("=")[0].strip(":") for line in str(caught.value).splitlines()[1:]] == [
        "rewards",
        "learner.gpus",
        "evaluation.problems",
    ]


@pytest.mark.parametrize(("sections", "expected"), [
    ({"seed": True}, "seed: Input should be a valid integer, got True"),
    ({"seed": 3.0}, "seed: Input should be a valid integer, got 3.0"),
    ({"seed": "3"}, "seed: Input should be a valid integer, got '3'"),
    ({"learner": {"cpus": True}}, "learner.cpus: Input should be a valid number, got True"),
    ({"rollout": {"temperature": float("inf")}}, "rollout.temperature: Input should be a finite number, got inf"),
    ({"rewards": {"a": {"kind": "answer", "weight": float("nan")}}},
     "rewards.a.weight: Input should be a finite number"),
    ({"learner": {"betas": [0.9, 1]}}, "learner.betas.1: Input should be less than 1, got 1"),
])  # fmt: skip
def test_a_number_is_a_number_and_nothing_that_looks_like_one(sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**sections), "run.yaml")
    assert expected in str(caught.value)


@pytest.mark.parametrize("sections", [
    {},
    {"rewards": {"mine": {"kind": "function", "function": "package.module:name"}}},
    {"rewards": {"a": {"kind": "answer", "weight": 0}, "f": {"kind": "format", "weight": -1}}},
    {"rollout": {"max_new_tokens": 511, "max_model_tokens": 512, "gpus": 0.5}},
    {"learner": {"ranks": 4, "gpus": 1}, "sft": {"steps": 1, "batch_size": 8}},
    {"task": KEGG, "policy": {"kind": "tiny", "tokenizer": "bpe"}, "evaluation": {"problems": 10_000}},
    {"task": KEGG, "policy": {"kind": "pretrained", "path": "models/x"}},
    {"evaluation": {"problems": 300}, "rollout": {"gpus": 2}},
])  # fmt: skip
def test_what_is_possible_is_accepted(sections: dict[str, Any]) -> None:
    assert parse_config(tree(**sections), "run.yaml").name == "test"


def test_a_configuration_cannot_be_changed_once_it_is_checked() -> None:
    config = parse_config(tree(), "run.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.grpo.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_every_key_documents_itself() -> None:
    seen: list[type[Section]] = [Config]
    for section in seen:
        for name, field in section.model_fields.items():
            assert name == "kind" or field.description, f"{section.__name__}.{name} has no text"
        seen.extend(child for child in _children(section) if child not in seen)
    assert len(seen) > 15  # 20 sections and more: the walk did not stop at the top


def _children(section: type[Section]) -> list[type[Section]]:
    found: list[type[Section]] = []
    pending: list[Any] = [field.annotation for field in section.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            found.append(annotation)
        else:
            pending.extend(getattr(annotation, "__args__", ()))
    return found


# ---------------------------------------------------------------- what a resumed run keeps


@pytest.mark.parametrize(("sections", "expected"), [
    ({"seed": 1}, "seed=1: the run was begun with seed=0"),
    ({"policy": {"kind": "tiny", "layers": 8}}, "policy.layers=8: the run was begun with policy.layers=4"),
    ({"policy": {"kind": "pretrained", "path": "x"}},
     "policy.kind=pretrained: the run was begun with policy.kind=tiny"),
    ({"encoder": {"kind": "esm", "path": "x"}}, "encoder.kind=esm: the run was begun with encoder.kind=tiny"),
    ({"sft": {"steps": 1}}, "sft=given: the run was begun with sft=null"),
    ({"learner": {"ranks": 2}}, "learner.ranks=2: the run was begun with learner.ranks=1"),
    ({"grpo": {"steps": 1, "kl": {"weight": 0.1}}},
     "grpo.kl=given: the run was begun with grpo.kl=null, and kept no copy of its warm start"),
])  # fmt: skip
def test_a_resumed_run_keeps_what_its_state_on_disk_was_made_with(sections: dict[str, Any], expected: str) -> None:
    begun, changed = parse_config(tree(), "run.yaml"), parse_config(tree(**sections), "run.yaml")
    with pytest.raises(ConfigError) as caught:
        refuse_changes(begun, changed)
    assert expected in str(caught.value)


def test_a_resumed_run_may_change_everything_else() -> None:
    grpo = {"steps": 1, "kl": {"weight": 0.1}}
    begun = parse_config(tree(policy={"kind": "pretrained", "path": "old"}, grpo=grpo), "run.yaml")
    changed = parse_config(
        tree(
            policy={"kind": "pretrained", "path": "new"},
            grpo={"steps": 9, "learning_rate": 1e-3},
            rollout={"workers": 2},
        ),
        "run.yaml",
    )
    refuse_changes(begun, changed)
