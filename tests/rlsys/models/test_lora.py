from __future__ import annotations

import pytest
import torch

from rlsys.errors import ConfigError
from rlsys.models.dna_llm import DnaLlm, sequence_inputs
from rlsys.models.lora import LoraOptions, apply_lora, merged_state_dict
from tests.rlsys.models.tiny_models import features, prompt, tiny_policy

OPTIONS = LoraOptions(r=4, alpha=12)


def adapted(**kwargs: bool) -> DnaLlm:
    """A policy whose adapters do something: B is not zero any more."""
    model = tiny_policy(**kwargs)
    apply_lora(model, OPTIONS, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def logits(model: DnaLlm) -> torch.Tensor:
    one = prompt([5])
    return model(**sequence_inputs(one.token_ids, one.slots, [torch.from_numpy(features(5, 0))])).logits.detach()


def test_fresh_adapters_change_nothing() -> None:
    model = tiny_policy()
    expected = logits(model)
    apply_lora(model, OPTIONS, seed=0)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_adapters_and_projector_train_and_nothing_else_does() -> None:
    model = adapted()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        name for name, _ in model.named_parameters() if "lora_" in name or name.startswith("projector.")
    }
    # 7 linear layers in each of 2 blocks, A and B each; the projector's 2 layers and 2 markers.
    assert len(trainable) == 2 * 7 * 2 + 4 + 2


def test_merged_weights_under_plain_names_make_the_adapted_policy() -> None:
    model, plain = adapted(), tiny_policy(seed=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = dict(merged_state_dict(model))
    assert list(merged) == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_merged_weight_equals_the_formula() -> None:
    model = adapted()
    layer = model.language_model.model.layers[1].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + (12 / 4) * b @ a
    merged = dict(merged_state_dict(model))["language_model.model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(merged, expected.detach())


def test_bfloat16_adapters_are_merged_in_float32() -> None:
    model = adapted().to(dtype=torch.bfloat16)
    layer = model.language_model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    exact = layer.base_layer.weight.float() + 3.0 * (b @ a)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(
        dict(merged_state_dict(model, dtype=torch.float32))[name], exact.detach(), rtol=0, atol=0
    )
    assert torch.equal(dict(merged_state_dict(model))[name], exact.to(torch.bfloat16))


@pytest.mark.parametrize("tied", [True, False])
def test_without_adapters_the_plain_weights_come_out_as_copies(tied: bool) -> None:
    model = tiny_policy(tied=tied)
    plain = dict(merged_state_dict(model))
    assert ("language_model.lm_head.weight" in plain) != tied
    for name, parameter in model.named_parameters():
        assert torch.equal(plain[name], parameter)
        assert plain[name].data_ptr() != parameter.data_ptr()


def test_only_the_named_layers_are_adapted() -> None:
    model = tiny_policy()
    apply_lora(model, LoraOptions(r=2, alpha=2, target_modules=("q_proj", "v_proj")), seed=0)
    adapters = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert [name.split(".")[-4] for name in adapters] == ["q_proj", "v_proj"] * 2


def test_an_unknown_layer_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"qproj.*name no linear layer.*q_proj"):
        apply_lora(tiny_policy(), LoraOptions(r=2, alpha=2, target_modules=("qproj",)), seed=0)


def test_the_seed_decides_the_adapters() -> None:
    def first_a(seed: int) -> torch.Tensor:
        model = tiny_policy()
        apply_lora(model, OPTIONS, seed=seed)
        return next(parameter.detach() for name, parameter in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first_a(1), first_a(1))
    assert not torch.equal(first_a(1), first_a(2))
