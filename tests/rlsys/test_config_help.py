"""What `rlsys config KEY` prints: every key, in words that can be written into a file."""

from __future__ import annotations

import pytest

from rlsys.config import Config
from rlsys.config_help import WIDTH, explain
from rlsys.errors import ConfigError


def entry(key: str, name: str) -> str:
    """What is printed about `name` in the explanation of `key`, on one line."""
    lines = explain(key).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"  {name}: "))
    rest = lines[first + 1 :]
    end = next((number for number, line in enumerate(rest) if not line.startswith(" " * 6)), len(rest))
    return " ".join(" ".join([lines[first], *rest[:end]]).split())


def keys_below(key: str = "") -> list[str]:
    """All keys that can be asked for: those that are listed, and those listed there."""
    listed = [line.split(":")[0].strip() for line in explain(key).splitlines() if line[:2] == "  " and line[2] != " "]
    below = [f"{key}.{name}".lstrip(".") for name in dict.fromkeys(listed)]
    return [*below, *(deeper for child in below if " -- " in explain(child) for deeper in keys_below(child))]


KEYS = keys_below()


@pytest.mark.parametrize(("key", "name", "expected"), [
    ("grpo", "steps", "steps: int >= 1, required Optimizer steps."),
    ("grpo", "order", "order: a section, kind: strict | windowed | evict, default strict How"),
    ("grpo", "advantage", "advantage: a section, kind: group_mean | group_normalized | rloo |"),
    ("grpo", "correction", "correction: a section or null, kind: tis | icepop | sequence_mask, default null A"),
    ("grpo", "kl", "kl: a section or null, default null Penalty"),
    ("grpo", "aggregation", "aggregation: token_mean | sequence_mean | constant, default token_mean How"),
    ("grpo", "filter_zero_variance", "filter_zero_variance: bool, default true Leave"),
    ("grpo.loss", "delta", "delta: float in (0, 1], default 0.2 A token"),
    ("grpo.loss", "dual_clip", "dual_clip: float > 1 or null, default null Bound"),
    ("", "task", "task: a section, kind: variant_consequence | kegg"),
    ("", "rollout", "rollout: a section, has defaults The"),
    ("", "rewards", "rewards: a mapping of names to sections"),
    ("learner", "betas", "betas: [float in [0, 1), float in [0, 1)], default [0.9, 0.95] AdamW's"),
    ("policy", "hidden_size", "hidden_size: int >= 32, a multiple of 32, default 128 Width H."),
])  # fmt: skip
def test_a_key_shows_its_type_its_default_and_its_meaning(key: str, name: str, expected: str) -> None:
    assert entry(key, name).startswith(expected)


def test_the_kinds_of_a_section_are_told_apart_and_the_default_is_marked() -> None:
    titles = [line for line in explain("grpo.order").splitlines() if line.startswith("grpo.order, ")]
    assert [title.split(" -- ")[0] for title in titles] == [
        "grpo.order, kind: strict (default)",
        "grpo.order, kind: windowed",
        "grpo.order, kind: evict",
    ]


def test_a_value_is_explained_alone() -> None:
    assert explain("grpo.steps") == "grpo.steps: int >= 1, required\n    Optimizer steps."


def test_a_section_says_where_there_is_more() -> None:
    assert "More with" not in explain("sft")
    assert "More with `rlsys config KEY` for grpo.order, grpo.advantage, grpo.loss" in explain("grpo")


def test_names_that_the_user_chooses_stand_for_any() -> None:
    assert "rewards.NAME" in explain("rewards")
    assert explain("rewards.mine").startswith("rewards.mine -- ")
    assert explain("rewards.mine.weight").startswith("rewards.mine.weight: float")
    with pytest.raises(ConfigError, match=r"rewards\.mine\.weigth: no such key; rewards\.mine has .*weight"):
        explain("rewards.mine.weigth")


def test_an_unknown_key_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"grpo\.stepz: no such key; grpo has .*, steps, "):
        explain("grpo.stepz")
    with pytest.raises(ConfigError, match=r"grpo\.steps is a value, it has no 'x'"):
        explain("grpo.steps.x")
    with pytest.raises(ConfigError, match=r"^bogus: no such key; the configuration has "):
        explain("bogus")


def test_every_key_can_be_asked_for_and_says_what_it_means() -> None:
    assert set(Config.model_fields) <= set(KEYS)
    assert {"grpo.loss.tau", "policy.lora.rank", "task.window_bp", "rewards.weight"} <= set(KEYS)
    for key in KEYS:
        first, *rest = explain(key).splitlines()
        assert first.startswith(f"{key}: ")
        assert any(line.startswith("    ") and line.strip() for line in rest), f"{key} is not documented"


def test_the_text_is_for_people() -> None:
    for key in ["", *KEYS]:
        text = explain(key)
        assert max(map(len, text.splitlines())) <= WIDTH
        assert not any(
            word in text for word in ("section or a section", "FieldInfo", "typing.", "None", "False", "NoneType")
        )
