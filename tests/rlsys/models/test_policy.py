from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from rlsys.errors import CheckpointError
from rlsys.models.lora import LoraOptions, apply_lora, merged_state_dict
from rlsys.models.policy import is_policy, load_policy, load_tokenizer, new_policy, policy_config, save_policy
from tests.rlsys.models.tiny_models import PAD, WIDTH, save_tiny, text_config, tiny_policy, tiny_tokenizer


def text_model(directory: Path, *, vocabulary: int | None = None, tied: bool = True) -> Path:
    """A text-only checkpoint whose tokenizer has 3 tokens."""
    config = text_config(tied=tied)
    config.vocab_size = vocabulary or config.vocab_size
    torch.manual_seed(123)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_policy_keeps_the_language_model_and_its_spare_rows(tmp_path: Path, tied: bool) -> None:
    directory = text_model(tmp_path, tied=tied)
    model, tokenizer = new_policy(directory, encoder_width=WIDTH, encoder={"id": "e"}, projector_kind="linear")
    original = Qwen3ForCausalLM.from_pretrained(directory).state_dict()
    mine = model.language_model.state_dict()
    assert all(torch.equal(mine[name], original[name]) for name in original)
    config = model.config
    assert (config.dna_hidden_size, config.projector_kind, config.encoder) == (WIDTH, "linear", {"id": "e"})
    assert config.dna_pad_token_id == tokenizer.convert_tokens_to_ids("<|dna_pad|>") == PAD
    assert config.tie_word_embeddings == tied


def test_the_embedding_grows_where_it_has_no_row_for_the_pad(tmp_path: Path) -> None:
    model, _ = new_policy(text_model(tmp_path, vocabulary=3), encoder_width=WIDTH)
    assert model.get_input_embeddings().weight.shape[0] == 64
    assert model.config.text_config.vocab_size == 64
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[PAD, 1]])).logits.shape == (1, 2, 64)


def test_new_slot_rows_are_about_as_long_as_token_embeddings(tmp_path: Path) -> None:
    model, tokenizer = new_policy(text_model(tmp_path), encoder_width=WIDTH)
    rows = model.projector([torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(0))])
    tokens = model.get_input_embeddings().weight[: len(tokenizer)]
    ratio = torch.linalg.vector_norm(rows, dim=-1).mean() / torch.linalg.vector_norm(tokens, dim=-1).mean()
    assert 0.7 < float(ratio.detach()) < 1.4  # 12 and 32 dimensions are few: the draw of the weights matters


def test_the_seed_decides_a_new_projector(tmp_path: Path) -> None:
    directory = text_model(tmp_path)
    first, same, other = (new_policy(directory, encoder_width=WIDTH, seed=seed)[0].projector for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.start_marker, other.start_marker)


def test_a_saved_policy_loads_bit_for_bit_with_its_tokenizer(tmp_path: Path) -> None:
    model = tiny_policy()
    for _ in range(2):  # the second one replaces the first
        save_policy(tmp_path / "policy", model, tiny_tokenizer())
    again = load_policy(tmp_path / "policy")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert not again.training
    assert load_tokenizer(tmp_path / "policy").convert_tokens_to_ids("<|dna_pad|>") == PAD
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_adapters_are_merged_into_a_saved_policy(tmp_path: Path) -> None:
    model = tiny_policy()
    apply_lora(model, LoraOptions(r=2, alpha=2), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_policy(tmp_path / "policy", model, tiny_tokenizer())
    saved = load_policy(tmp_path / "policy").state_dict()
    for name, tensor in merged_state_dict(model):
        assert torch.equal(saved[name], tensor)


def test_a_rank_that_does_not_write_only_takes_part(tmp_path: Path) -> None:
    save_policy(tmp_path / "policy", tiny_policy(), tiny_tokenizer(), write=False)
    assert not list(tmp_path.iterdir())


def test_a_policy_is_told_from_a_text_model(tmp_path: Path) -> None:
    text, policy = text_model(tmp_path / "text"), save_tiny(tmp_path / "policy", tiny_policy())
    assert (is_policy(text), is_policy(policy)) == (False, True)
    assert policy_config(policy).dna_hidden_size == WIDTH
    with pytest.raises(CheckpointError, match="'qwen3' model and no DNA-LLM"):
        load_policy(text)


def rewrite(directory: Path, drop: str = "", **add: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name != drop}
    save_file(tensors | add, path, metadata={"format": "pt"})


def test_whatever_is_wrong_with_a_directory_is_explained(tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return save_tiny(tmp_path / name, tiny_policy())

    marker = "projector.start_marker"
    no_weights, cut, no_marker, extra, shape, no_config, garbled = (
        broken(name) for name in ("weights", "cut", "marker", "extra", "shape", "config", "garbled")
    )
    (no_weights / "model.safetensors").unlink()
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    rewrite(no_marker, drop=marker)
    rewrite(extra, surplus=torch.zeros(2))
    rewrite(shape, **{marker: torch.zeros(5)})
    (no_config / "config.json").unlink()
    (garbled / "config.json").write_text("{")
    for directory, reason in (
        (tmp_path / "nowhere", "no such directory"), (no_weights, "cannot be loaded"), (cut, "cannot be loaded"),
        (no_marker, f"missing.*{marker}"), (extra, "unexpected.*surplus"), (shape, f"mismatched.*{marker}"),
        (no_config, r"config\.json: cannot be read"), (garbled, r"config\.json: cannot be read"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_policy(directory)
        assert str(directory) in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 3


def test_a_policy_of_an_unknown_text_model_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, tiny_policy())
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["model_type"] = "nothing"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot be used"):
        load_policy(directory)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
