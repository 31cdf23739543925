"""Configurations that cannot be used, as a user meets them: each is told with its path, its value and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsys.config_rules import RULES
from tests.bad_input.conftest import CONFIGURATION, Refused

KEGG = ["task={kind: kegg, train: a.jsonl, validation: b.jsonl, test: c.jsonl}"]

# What is changed in a configuration that can be used -> what the message must say.
OVERRIDES: dict[str, tuple[list[str], list[str]]] = {
    # keys
    "an unknown key": (["zzz=1"], ["run.yaml cannot be used", "zzz: no such key", "the top level has name, seed"]),
    "a mistyped section": (["gropo.steps=3"], ["gropo: no such key; did you mean grpo?"]),
    "a mistyped key": (["grpo.group_sise=4"], ["grpo.group_sise: no such key; did you mean grpo.group_size?"]),
    "a mistyped key of a kind": (["policy.layer=2"], ["policy.layer: no such key; did you mean policy.layers?"]),
    "a key of another kind": (["policy.path=models/x"], ["policy.path: no such key; policy has kind, tokenizer"]),
    "a mistyped key of a loss": (["grpo.loss={kind: dppo, detla: 1}"], ["grpo.loss.detla",
                                                                        "did you mean grpo.loss.delta?"]),
    "a mistyped key of a reward": (["rewards.answer.wieght=2"], ["rewards.answer.wieght",
                                                                 "mean rewards.answer.weight?"]),
    "an unknown kind": (["encoder.kind=evo3"], ["encoder.kind: evo3; use one of 'tiny', 'esm'"]),
    "an unknown kind of reward": (["rewards.answer.kind=anser"], ["rewards.answer.kind", "'format', 'answer'",
                                                                  "'anser'"]),
    "a missing key": (["task={kind: kegg, train: a, validation: b}", "policy.tokenizer=bpe"],
                      ["task.test: is required and not given"]),
    # types
    "text for a number": (["grpo.steps=many"], ["grpo.steps: Input should be a valid integer, got 'many'"]),
    "a fraction for a count": (["grpo.steps=1.5"], ["grpo.steps: Input should be a valid integer, got 1.5"]),
    "true for a count": (["grpo.steps=true"], ["grpo.steps: Input should be a valid integer, got True"]),
    "true for a number": (["sft.learning_rate=true"], ["sft.learning_rate: Input should be a valid number, got True"]),
    "nothing for a number": (["grpo.steps="], ["grpo.steps: Input should be a valid integer, got None"]),
    "a number for a name": (["name=2024"], ["name: 2024 is not text; put it in quotes"]),
    "a path for a name": (["name=a/b"], ["name: String should match pattern", "'a/b'"]),
    "a value for a section": (["sft=3"], ["sft: has keys of its own (sft.steps), got 3"]),
    "a list for the rewards": (["rewards=[answer]"], ["rewards: has keys of its own", "['answer']"]),
    "one beta": (["learner.betas=[0.9]"], ["learner.betas.1: is required and not given"]),
    # ranges
    "no step": (["grpo.steps=0"], ["grpo.steps: Input should be greater than or equal to 1, got 0"]),
    "a group of one": (["grpo.group_size=1"], ["grpo.group_size: Input should be greater than or equal to 2, got 1"]),
    "a negative bound": (["grpo.max_staleness=-1"], ["grpo.max_staleness", "greater than or equal to 0, got -1"]),
    "an infinite rate": (["sft.learning_rate=.inf"], ["sft.learning_rate: Input should be a finite number, got inf"]),
    "a weight that is no number": (["rewards.answer.weight=.nan"], ["rewards.answer.weight",
                                                                    "a finite number, got nan"]),
    "a decay rate of one": (["learner.betas=[0.9, 1.0]"], ["learner.betas.1: Input should be less than 1, got 1.0"]),
    "a temperature of zero": (["rollout.temperature=0"],
                              ["rollout.temperature: Input should be greater than 0, got 0"]),
    "an unknown stage": (["learner.zero_stage=4"], ["learner.zero_stage: Input should be 1, 2 or 3, got 4"]),
    "an even window": (["task.window_codons=4"], ["task: window_codons=4 has no middle codon; use an odd number"]),
    "windows that are too few": (["task.window_codons=3", "task.train_problems=100000000"],
                                 ["task.window_codons=3", "100000006", "lower task.train_problems"]),
    # overrides
    "an override without a value": (["grpo.steps"], ["override 'grpo.steps': write it as a.b=value"]),
    "an override without a key": (["=3"], ["override '=3': write it as a.b=value"]),
    "an override that is no YAML": (["grpo.steps=[3"], ["override 'grpo.steps=[3': the value is not YAML"]),
    "an override below a value": (["grpo=3", "grpo.steps=3"], ["'grpo.steps=3': another override gives grpo a value"]),
}  # fmt: skip
# Rules between sections: both numbers and a way out.
COMBINATIONS: dict[str, tuple[list[str], list[str]]] = {
    "there_is_a_reward": (["rewards=null", "rewards={}"], ["rewards: no part is named", "rewards.answer.kind=answer"]),
    "a_reward_part_has_weight": (["rewards.answer.weight=0"], ["rewards: every weight is 0 (answer)"]),
    "reward_parts_find_their_facts": (
        [*KEGG, "policy.tokenizer=bpe", "rewards.steps.kind=amino_acid"],
        ["rewards.steps.kind=amino_acid", "task.kind=kegg", "leave the part out"]),
    "a_completion_fits_into_the_engine": (
        ["rollout.max_new_tokens=128"], ["rollout.max_new_tokens=128", "rollout.max_model_tokens=128",
                                         "raise the second"]),
    "a_completion_fits_into_a_micro_batch": (
        ["learner.micro_batch_tokens=48"],
        ["rollout.max_new_tokens=48", "learner.micro_batch_tokens=48", "raise the second"]),
    "heads_suit_the_engine": (
        ["policy.attention_heads=2"], ["policy.hidden_size=32", "policy.attention_heads=2",
                                       "use for example 128 and 4"]),
    "the_tokenizer_knows_the_task": (KEGG, ["policy.tokenizer=words", "task.kind=kegg", "use policy.tokenizer=bpe"]),
    "a_learner_rank_drives_one_gpu_or_none": (["learner.gpus=2"], ["learner.gpus=2", "raise learner.ranks"]),
    "a_rollout_worker_shares_a_gpu_or_has_whole_ones": (["rollout.gpus=1.5"], ["rollout.gpus=1.5", "use 1 or 2"]),
    "enough_test_problems_are_made": (
        ["evaluation.problems=4"], ["evaluation.problems=4", "task.test_problems=3",
                                    "lower the first or raise the second"]),
    "streaming_needs_weights_known_in_advance": (
        ["grpo.streaming=true"],
        ["grpo.streaming=true", "grpo.aggregation=token_mean", "use grpo.aggregation=constant"]),
    "streaming_needs_advantages_of_single_groups": (
        ["grpo.streaming=true", "grpo.aggregation=constant", "grpo.advantage.kind=reinforce_plus_plus"],
        ["grpo.streaming=true", "grpo.advantage.kind=reinforce_plus_plus", "use another advantage"]),
    "streaming_needs_a_loss_of_single_tokens": (
        ["grpo.streaming=true", "grpo.aggregation=constant", "grpo.loss.kind=m2po"],
        ["grpo.streaming=true", "grpo.loss.kind=m2po", "use another loss"]),
    "loss_and_correction_go_together": (
        ["grpo.correction.kind=tis"], ["grpo.correction.kind=tis", "grpo.loss.kind=dppo"]),
    "a_window_leaves_room_for_a_batch": (
        ["grpo.order.kind=windowed", "grpo.order.window=9", "grpo.max_staleness=2"],
        ["grpo.order.window=9", "grpo.max_staleness=2", "grpo.groups_per_step=4", "raise the second"]),
    "a_group_has_more_completions_than_k": (
        ["grpo.advantage.kind=pass_at_k", "grpo.advantage.k=4", "grpo.group_size=4"],
        ["grpo.advantage.k=4", "grpo.group_size=4", "raise the second"]),
    "the_length_penalty_begins_within_the_limit": (
        ["grpo.over_long.kind=penalise", "grpo.over_long.buffer_tokens=49"],
        ["grpo.over_long.buffer_tokens=49", "rollout.max_new_tokens=48", "lower it"]),
    "interleaved_evaluations_have_problems": (
        ["evaluation.every_steps=2"],
        ["evaluation.interleaved_problems=64", "task.validation_problems=", "raise the second"]),
}  # fmt: skip
# Whole files: name -> text -> message. The file is run.yaml, with complete.yaml beside it.
FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "an empty file": ("", ["run.yaml: holds NoneType, not a mapping", "configs/quickstart.yaml"]),
    "a list": ("- a\n", ["run.yaml: holds list, not a mapping"]),
    "a list that does not end": ("name: x\ngrpo: [1\n", ["run.yaml:3: not YAML"]),
    "a tabulator": ("name: x\n\tseed: 1\n", ["run.yaml:2: not YAML"]),
    "a key twice": ("name: x\nseed: 1\nname: y\n", ["run.yaml:3: not YAML: the key 'name' stands here twice"]),
    "two documents": ("name: x\n---\nname: y\n", ["run.yaml:2: not YAML"]),
    "bytes": (b"name: \xff\n", ["run.yaml: cannot be read as text"]),
    "a key that is a number": (f"{CONFIGURATION}1: 2\n", ["run.yaml", "1: Keys should be strings"]),
    "a base that is missing": ("base: quikstart.yaml\n",
                               ["run.yaml: base: quikstart.yaml: no such configuration file"]),
    "a base that is no name": ("base: [a.yaml]\n",
                               ["run.yaml: base: must name a file beside this one, got ['a.yaml']"]),
    "a base with a base": ("base: child.yaml\n", ["child.yaml: has a base: of its own", "one level only"]),
    "a mistake in the base": ("base: broken.yaml\n", ["broken.yaml:3: not YAML"]),
}  # fmt: skip


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_value_that_cannot_be_used_is_refused(case: str, workplace: Path, refused: Refused) -> None:
    overrides, expected = OVERRIDES[case]
    message = refused("train", "run.yaml", "--dry-run", *overrides)
    assert [fragment for fragment in expected if fragment not in message] == [], message


@pytest.mark.parametrize("rule", COMBINATIONS)
def test_an_impossible_combination_is_refused_with_both_values(rule: str, workplace: Path, refused: Refused) -> None:
    overrides, expected = COMBINATIONS[rule]
    if rule == "there_is_a_reward":  # a mapping in an override is merged, so the file itself is changed
        (workplace / "run.yaml").write_text(CONFIGURATION.replace("rewards:\n  answer: {kind: answer}", "rewards: {}"))
        overrides = []
    message = refused("train", "run.yaml", *overrides)
    assert [fragment for fragment in expected if fragment not in message] == [], message
    assert len(message.splitlines()) == 2, message  # and no other rule is broken


def test_every_rule_has_its_case() -> None:
    assert [rule.__name__ for rule in RULES] == list(COMBINATIONS)


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_configuration_is_refused(case: str, workplace: Path, refused: Refused) -> None:
    text, expected = FILES[case]
    (workplace / "complete.yaml").write_text(CONFIGURATION)
    (workplace / "child.yaml").write_text("base: complete.yaml\n")
    (workplace / "broken.yaml").write_text("name: x\nseed: [\n")
    (workplace / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused("train", "run.yaml", "--dry-run")
    assert [fragment for fragment in expected if fragment not in message] == [], message


def test_all_mistakes_of_a_file_are_told_at_once_each_on_its_line(workplace: Path, refused: Refused) -> None:
    message = refused("train", "run.yaml", "grpo.stepz=1", "rollout.workers=0", "learner.betas=[1, 1]", lines=5)
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        "grpo.stepz",
        "learner.betas.0",
        "learner.betas.1",
        "rollout.workers",
    ]


def test_all_impossible_combinations_are_told_at_once(workplace: Path, refused: Refused) -> None:
    message = refused(
        "train", "run.yaml", "learner.gpus=2", "evaluation.problems=4", "rewards.answer.weight=0", lines=5
    )
    assert [line.split()[0].rstrip(":") for line in message.splitlines()[1:]] == [
        "rewards",
        "learner.gpus=2",
        "evaluation.problems=4",
    ]


def test_a_kl_penalty_cannot_be_turned_on_later(workplace: Path, refused: Refused) -> None:
    (workplace / "runs" / "test").mkdir(parents=True)
    (workplace / "runs" / "test" / "config.yaml").write_text(CONFIGURATION)
    message = refused("train", "--resume", "runs/test", "grpo.kl.weight=0.1")
    expected = ["a resumed run cannot change", "grpo.kl=given", "begun with grpo.kl=null", "begin a new run"]
    assert [fragment for fragment in expected if fragment not in message] == [], message


@pytest.mark.parametrize(("arguments", "expected"), [
    (["train"], ["name a configuration, for example configs/quickstart.yaml", "--resume RUN"]),
    (["train", "rum.yaml"], ["rum.yaml: no such configuration file", "has run.yaml"]),
    (["train", "."], [".: cannot be read as text"]),
    (["train", "grpo.steps=3"], ["grpo.steps=3: no such configuration file",
                                 "rlsys train configs/quickstart.yaml grpo.steps=3"]),
    (["evaluate", "rum.yaml", "--policy", "x"], ["rum.yaml: no such configuration file"]),
    (["sft", "run.yaml", "sft=null"], ["`rlsys sft` runs the warm start", "no sft: section", "sft.steps=100"]),
    (["config", "grpo.stepz"], ["grpo.stepz: no such key; grpo has advantage"]),
    (["config", "grpo.steps.x"], ["grpo.steps is a value, it has no 'x'"]),
])  # fmt: skip
def test_a_command_line_that_lacks_what_it_needs_is_refused(
    arguments: list[str], expected: list[str], workplace: Path, refused: Refused
) -> None:
    message = refused(*arguments)
    assert [fragment for fragment in expected if fragment not in message] == [], message


def test_an_override_may_stand_behind_an_option(workplace: Path, refused: Refused) -> None:
    assert "grpo.steps: Input should be greater" in refused("train", "run.yaml", "--dry-run", "grpo.steps=0")
    assert "grpo.steps: Input should be greater" in refused("train", "--dry-run", "run.yaml", "grpo.steps=0")


@pytest.mark.parametrize("arguments", [
    ["train", "run.yaml", "--bogus"], ["config", "grpo", "more"], ["trian", "run.yaml"], [],
    ["generate", "policy", "problem.json", "--samples", "many"], ["generate", "policy", "problem.json", "a=b"],
])  # fmt: skip
def test_arguments_that_the_command_line_does_not_know_end_with_its_usage(
    arguments: list[str], workplace: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match=r"usage: rlsys"):  # argparse speaks, in its own form
        refused(*arguments)
