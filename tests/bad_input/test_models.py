"""Model directories that cannot be used: missing, damaged, of another kind, or not made for each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlsys.models.tiny import make_tiny_encoder
from tests.bad_input.conftest import Models, Refused, copy

Damage = Callable[[Path], object]


def cut(name: str) -> Damage:
    """Leaves the first half of a file."""
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[: (place / name).stat().st_size // 2])


def remove(name: str) -> Damage:
    return lambda place: (place / name).unlink()


def write(name: str, content: str) -> Damage:
    return lambda place: (place / name).write_text(content)


def change(**values: object) -> Damage:
    """Changes values of config.json."""

    def apply(place: Path) -> None:
        path = place / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


BERT = json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32,
                   "num_hidden_layers": 1,
                   "num_attention_heads": 1, "intermediate_size": 64, "vocab_size": 100})  # fmt: skip

ENCODERS: dict[str, tuple[Damage, list[str]]] = {
    "without a configuration": (remove("config.json"), ["x/config.json: cannot be read", "is this an encoder?"]),
    "with a damaged configuration": (cut("config.json"), ["x/config.json: cannot be read", "is this an encoder?"]),
    "of another family": (write("config.json", BERT), ["x: holds a 'bert' model", "Nucleotide Transformer v1"]),
    "of version 2": (change(auto_map={"AutoModel": "modeling_esm.EsmModel"}),
                     ["x: is a Nucleotide Transformer v2", "Use a v1 checkpoint"]),
    "without its sizes": (change(hidden_size=None), ["x/config.json: has no hidden_size"]),
    "without a vocabulary": (remove("vocab.txt"), ["x/vocab.txt: the encoder's vocabulary cannot be read"]),
    "of proteins": (write("vocab.txt", "\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "G", "V", "S", "E",
                                                  "R", "T", "I", "D", "P", "K", "Q", "N", "F", "Y", "M", "H", "W",
                                                  "C"])),
                    ["x/vocab.txt", "no k-mers", "Is this a protein model?"]),
    "with a damaged tokenizer": (write("tokenizer_config.json", "{"), ["x/tokenizer_config.json: cannot be read"]),
    "without weights": (remove("model.safetensors"), ["x: holds no weights (*.safetensors"]),
    "with damaged weights": (cut("model.safetensors"), ["x/model.safetensors: the weights are damaged",
                                                        "Get it again"]),
}  # fmt: skip
POLICIES: dict[str, tuple[Damage, list[str]]] = {
    "without a configuration": (remove("config.json"), ["x/config.json: cannot be read", "is this a model?"]),
    "with a configuration that is no JSON": (write("config.json", "{"), ["x/config.json: cannot be read"]),
    "with a configuration that is a list": (write("config.json", "[]"), ["x/config.json: is no JSON object"]),
    "of another architecture": (write("config.json", BERT), ["x: 28 weights are missing", "belongs to another model"]),
    "of an unknown architecture": (change(model_type="unheard_of"), ["x: no causal language model can be loaded"]),
    "with an unknown language model": (change(text_config={"model_type": "unheard_of"}),
                                       ["x/config.json: cannot be used"]),
    "without weights": (remove("model.safetensors"), ["x: holds no weights", "restore it"]),
    "with damaged weights": (cut("model.safetensors"), ["x/model.safetensors: the weights are damaged",
                                                        "Get it again"]),
    "with weights that are none": (write("model.safetensors", "none"),
                                   ["x/model.safetensors: the weights are damaged"]),
    "without a tokenizer": (remove("tokenizer.json"), ["x: no tokenizer can be loaded from here"]),
    "of fewer positions": (change(text_config={"model_type": "qwen3", "max_position_embeddings": 100}),
                           ["rollout.max_model_tokens=128 is more than the 100 positions of the policy in",
                            "lower it"]),
}  # fmt: skip


def esm(path: Path) -> list[str]:
    return ["encoder.kind=esm", f"encoder.path={path}"]


def pretrained(path: Path) -> list[str]:
    # Replaces the section whole, and with it the keys of the tiny policy.
    return ["policy.kind=pretrained", f"policy.path={path}"]


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_that_cannot_be_used_is_refused(
    case: str, workplace: Path, models: Models, refused: Refused
) -> None:
    damage, expected = ENCODERS[case]
    place = copy(models.encoder, workplace / "x")
    damage(place)
    message = refused("train", "run.yaml", "--dry-run", *esm(place))
    assert [fragment for fragment in expected if fragment not in message] == [], message


@pytest.mark.parametrize("case", POLICIES)
def test_a_policy_that_cannot_be_used_is_refused(case: str, workplace: Path, models: Models, refused: Refused) -> None:
    damage, expected = POLICIES[case]
    place = copy(models.policy, workplace / "x")
    damage(place)
    message = refused("train", "run.yaml", "--dry-run", *pretrained(place), *esm(models.encoder))
    assert [fragment for fragment in expected if fragment not in message] == [], message


def test_a_language_model_without_chat_turns_is_refused(workplace: Path, models: Models, refused: Refused) -> None:
    place = copy(models.text, workplace / "x")
    for file in (place / "tokenizer.json", place / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("<|im_", "<|xx_"))
    message = refused("train", "run.yaml", "--dry-run", *pretrained(place))
    assert f"{place}: the tokenizer has no <|im_start|>" in message


def test_a_language_model_with_damaged_weights_is_refused(workplace: Path, models: Models, refused: Refused) -> None:
    place = copy(models.text, workplace / "x")
    cut("model.safetensors")(place)
    assert f"{place}: no causal language model can be loaded" in refused(
        "train", "run.yaml", "--dry-run", *pretrained(place)
    )


@pytest.mark.parametrize("overrides", [esm(Path("nowhere")), pretrained(Path("nowhere"))], ids=["encoder", "policy"])
def test_a_directory_that_is_missing_is_refused(overrides: list[str], workplace: Path, refused: Refused) -> None:
    assert "nowhere: no such directory" in refused("train", "run.yaml", "--dry-run", *overrides)


def test_a_layer_that_the_encoder_does_not_have_is_refused(workplace: Path, models: Models, refused: Refused) -> None:
    message = refused("train", "run.yaml", "--dry-run", *esm(models.encoder), "encoder.layer=7")
    assert "has 1 layers, so no layer 7; use -1 for the last" in message


def test_a_policy_trained_on_features_of_another_width_is_refused(
    workplace: Path, models: Models, refused: Refused
) -> None:
    message = refused("train", "run.yaml", "--dry-run", *pretrained(models.policy), *esm(models.narrow_encoder))
    assert f"{models.policy}: the policy was trained on features of encoder esm-" in message
    assert "(width 64)" in message
    assert "(width 32)" in message
    assert "encoder.path" in message


def test_a_policy_trained_on_features_of_another_encoder_is_refused(
    workplace: Path, models: Models, refused: Refused
) -> None:
    # The tiny encoder of another seed: the same sizes, other weights.
    message = refused("train", "run.yaml", "--dry-run", *pretrained(models.policy), "seed=1")
    assert "Name the encoder that it was trained with" in message


def test_an_encoder_is_no_policy(workplace: Path, models: Models, refused: Refused) -> None:
    message = refused("train", "run.yaml", "--dry-run", *pretrained(make_tiny_encoder(workplace / "e")))
    assert f"{workplace / 'e'}: " in message


@pytest.mark.parametrize(("policy", "expected"), [
    ("nowhere", ["nowhere: no such directory"]),
    ("text", ["text: holds a 'qwen3' model and no DNA-LLM", "policy.path"]),
    ("encoder", ["encoder: holds a 'esm' model and no DNA-LLM"]),
])  # fmt: skip
def test_what_is_no_policy_cannot_be_evaluated(
    policy: str, expected: list[str], workplace: Path, models: Models, refused: Refused
) -> None:
    message = refused("evaluate", "run.yaml", "--policy", models.policy.with_name(policy))
    assert [fragment for fragment in expected if fragment not in message] == [], message


def test_a_policy_cannot_be_evaluated_on_another_encoder(workplace: Path, models: Models, refused: Refused) -> None:
    message = refused("evaluate", "run.yaml", "--policy", models.policy, *esm(models.other_encoder))
    assert "Name the encoder that it was trained with" in message
