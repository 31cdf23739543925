"""Configuration files: reading, bases, overrides, and messages that say what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlsys.config import Config, KeggTask, PretrainedPolicy, TinyPolicy
from rlsys.config_file import dump_config, load_config
from rlsys.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

COMPLETE = """\
name: test
task: {kind: variant_consequence, train_problems: 100}
policy: {kind: tiny, layers: 2}
encoder: {kind: tiny}
sft: {steps: 5}
grpo: {steps: 7}
rewards: {answer: {kind: answer, weight: 2}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(COMPLETE)
    return path


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---------------------------------------------------------------- reading


def test_a_file_fills_the_sections_and_leaves_defaults_elsewhere(file: Path) -> None:
    config = load_config(file)
    assert (config.grpo.steps, config.grpo.group_size, config.rewards["answer"].weight) == (7, 8, 2.0)


def test_a_number_with_an_exponent_is_a_number(file: Path) -> None:
    assert load_config(file, ["grpo.learning_rate=1e-6"]).grpo.learning_rate == 1e-6
    assert "got 0.001" in message_of(file, "grpo.steps=1e-3")  # and not the text '1e-3', as YAML 1.1 has it


def test_a_dumped_configuration_reads_back_as_an_equal_one(file: Path, tmp_path: Path) -> None:
    config = load_config(
        file,
        [
            "grpo.loss={kind: ppo_clip, epsilon_high: 0.28}",
            "learner.betas=[0.8, 0.9]",
            "policy.lora={rank: 4}",
            "sft=null",
        ],
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_a_dump_names_every_key(file: Path) -> None:
    assert set(yaml.safe_load(dump_config(load_config(file)))) == set(Config.model_fields)


def test_every_shipped_configuration_can_be_used() -> None:
    # kegg_tiny leaves the paths of the data to the caller.
    overrides = {"kegg_tiny.yaml": ["task.train=a.jsonl", "task.validation=b.jsonl", "task.test=c.jsonl"]}
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert paths, "configs/ is not empty"
    for path in paths:
        assert path.read_text().startswith("#"), f"{path.name} does not open with what it reproduces"
        load_config(path, overrides.get(path.name, []))


# ---------------------------------------------------------------- base


def test_a_file_changes_single_keys_of_its_base(file: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: run.yaml\ngrpo: {group_size: 4}\n")
    config = load_config(child)
    assert (config.grpo.steps, config.grpo.group_size, config.name) == (7, 4, "test")


def test_a_section_of_another_kind_replaces_the_base_section_whole(file: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: run.yaml\npolicy: {kind: pretrained, path: models/x}\n")
    assert load_config(child).policy == PretrainedPolicy(kind="pretrained", path="models/x")


def test_a_base_must_be_complete_itself(file: Path, tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text("base: run.yaml\n")
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("base: child.yaml\n")
    assert "child.yaml: has a base: of its own" in message_of(grandchild)


# ---------------------------------------------------------------- overrides


def test_overrides_win_over_the_file_and_the_last_one_wins(file: Path) -> None:
    assert load_config(file, ["grpo.steps=8", "grpo.steps=9"]).grpo.steps == 9


def test_an_override_reaches_a_section_that_the_file_does_not_have(file: Path) -> None:
    assert load_config(file, ["rollout.workers=3"]).rollout.workers == 3


def test_an_override_adds_a_reward_part(file: Path) -> None:
    rewards = load_config(file, ["rewards.format.kind=format", "rewards.format.weight=0.5"]).rewards
    assert {name: part.weight for name, part in rewards.items()} == {"answer": 2.0, "format": 0.5}


@pytest.mark.parametrize("order", [1, -1])
def test_an_override_of_the_kind_drops_the_keys_of_the_old_kind_in_any_order(file: Path, order: int) -> None:
    overrides = ["policy.kind=pretrained", "policy.path=models/x"][::order]
    assert load_config(file, overrides).policy == PretrainedPolicy(kind="pretrained", path="models/x")


def test_an_override_of_the_same_kind_keeps_the_other_keys(file: Path) -> None:
    policy = load_config(file, ["policy.kind=tiny"]).policy
    assert isinstance(policy, TinyPolicy)
    assert policy.layers == 2


def test_a_path_with_an_equals_sign_is_a_value(file: Path) -> None:
    task = load_config(
        file, ["task={kind: kegg, train: a, validation: b, test: c}", "task.train=x=y.jsonl", "policy.tokenizer=bpe"]
    ).task
    assert isinstance(task, KeggTask)
    assert task.train == "x=y.jsonl"


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(("override", "expected"), [
    # unknown keys, with what was probably meant
    ("grpo.group_sise=4", "grpo.group_sise: no such key; did you mean grpo.group_size?"),
    ("polcy.kind=tiny", "polcy: no such key; did you mean policy?"),
    ("policy.hidden=64", "policy.hidden: no such key; did you mean policy.hidden_size?"),
    ("policy.path=models/x", "policy.path: no such key; policy has kind, tokenizer,"),
    ("rewards.answer.weigth=2", "rewards.answer.weigth: no such key; did you mean rewards.answer.weight?"),
    ("grpo.loss={kind: dppo, detla: 0.1}", "grpo.loss.detla: no such key; did you mean grpo.loss.delta?"),
    ("policy.lora.r=4", "policy.lora.r: no such key; policy.lora has rank, alpha, dropout"),
    ("zzz=1", "zzz: no such key; the top level has name, seed"),
    # values of the wrong kind
    ("grpo.steps=many", "grpo.steps: Input should be a valid integer"),
    ("grpo.steps=1.5", "grpo.steps: Input should be a valid integer"),
    ("grpo.learning_rate=fast", "grpo.learning_rate: Input should be a valid number"),
    ("name=2024", "name: 2024 is not text; put it in quotes if it is meant"),
    ("name=a/b", "name: String should match pattern"),
    ("name.first=a", "name: {'first': 'a'} is not text"),
    ("learner.betas=[0.9]", "learner.betas.1: is required and not given"),
    ("sft=3", "sft: has keys of its own (sft.steps), got 3"),
    ("task=kegg", "task: has keys of its own (task.kind), got 'kegg'"),
    ("rewards.answer=null", "rewards.answer: has keys of its own"),
    # values out of range
    ("grpo.steps=0", "grpo.steps: Input should be greater than or equal to 1, got 0"),
    ("grpo.group_size=1", "grpo.group_size: Input should be greater than or equal to 2, got 1"),
    ("grpo.max_staleness=-1", "grpo.max_staleness: Input should be greater than or equal to 0, got -1"),
    ("rollout.temperature=0", "rollout.temperature: Input should be greater than 0, got 0"),
    ("learner.zero_stage=4", "learner.zero_stage: Input should be 1, 2 or 3, got 4"),
    ("learner.precision=fp16", "learner.precision: Input should be 'fp32' or 'bf16', got 'fp16'"),
    # variants
    ("task.kind=keg", "task.kind: keg; use one of 'variant_consequence', 'kegg'"),
    ("grpo.loss={delta: 0.1}", "grpo.loss.kind: not given; use one of 'dppo', 'reinforce', 'ppo_clip', "),
    ("rewards.answer.kind=anser", "rewards.answer.kind: Input should be 'format', 'answer'"),
    # overrides that are none
    ("grpo.steps", "override 'grpo.steps': write it as a.b=value"),
    ("=3", "override '=3': write it as a.b=value"),
    ("grpo..steps=3", "override 'grpo..steps=3': write it as a.b=value"),
    ("grpo.steps=[3", "override 'grpo.steps=[3': the value is not YAML"),
])  # fmt: skip
def test_a_wrong_override_is_explained(file: Path, override: str, expected: str) -> None:
    assert expected in message_of(file, override)


def test_an_override_below_another_override_with_a_value_is_refused(file: Path) -> None:
    assert "another override gives grpo a value" in message_of(file, "grpo=3", "grpo.steps=3")


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    lines = message_of(file, "grpo.stepz=1", "learner.zero_stage=9", "rollout.workers=0", "polcy={}").splitlines()
    assert lines[0] == f"{file} cannot be used:"
    assert sorted(line.split(":")[0].strip() for line in lines[1:]) == [
        "grpo.stepz",
        "learner.zero_stage",
        "polcy",
        "rollout.workers",
    ]


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("name: x\ngrpo: {}\n")
    message = message_of(path)
    assert "  task: is required and not given" in message
    assert "  grpo.steps: is required and not given" in message


@pytest.mark.parametrize(("text", "expected"), [
    ("", "run.yaml: holds NoneType, not a mapping of keys"),
    ("- a\n- b\n", "run.yaml: holds list, not a mapping of keys"),
    ("name: x\nname: y\n", "run.yaml:2: not YAML: the key 'name' stands here twice"),
    ("grpo:\n  steps: 1\n  steps: 2\n", "run.yaml:3: not YAML: the key 'steps' stands here twice"),
    ("name: [x\n", "run.yaml:2: not YAML:"),
    ("? [a, b]\n: c\n", "run.yaml:1: not YAML:"),
    ("\tname: x\n", "run.yaml:1: not YAML:"),
    ("base: other.yaml\n", "other.yaml: no such configuration file"),
])  # fmt: skip
def test_a_file_that_is_no_configuration_is_explained(file: Path, text: str, expected: str) -> None:
    file.write_text(text)
    assert expected in message_of(file)


def test_a_missing_file_is_answered_with_the_files_that_are_there(file: Path) -> None:
    assert message_of(file.with_name("rum.yaml")) == (
        f"{file.with_name('rum.yaml')}: no such configuration file; {file.parent} has run.yaml"
    )


def test_bytes_that_are_no_text_are_refused(file: Path) -> None:
    file.write_bytes(b"name: \xff\xfe\n")
    assert "run.yaml: cannot be read as text" in message_of(file)
