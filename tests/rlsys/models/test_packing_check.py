from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlsys.errors import ConfigError
from rlsys.models.dna_llm import DnaLlm
from rlsys.models.packed_attention import PACKED, register
from rlsys.models.packing_check import check_packing
from tests.rlsys.models.tiny_models import tiny_policy


def packed_policy() -> DnaLlm:
    model = tiny_policy()
    model.set_attn_implementation(PACKED)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_attention_keeps_packed_sequences_apart(dtype: torch.dtype) -> None:
    model = packed_policy().to(dtype=dtype)
    model.train()
    check_packing(model)
    assert model.training


def test_it_keeps_them_apart_when_activations_are_computed_anew() -> None:
    model = packed_policy()
    model.language_model.gradient_checkpointing_enable()
    model.train()
    check_packing(model)


def ignores_packing(*arguments: Any, **keywords: Any) -> Any:
    """Plain causal attention along the line, as a kernel that knows nothing of packing runs it."""
    module, query, key, value, _, *rest = arguments
    known = {name: value for name, value in keywords.items() if name not in ("samples_BL", "places_T")}
    return sdpa_attention_forward(module, query, key, value, None, *rest, **known | {"is_causal": True})


def test_an_attention_that_ignores_packing_is_refused() -> None:
    model = packed_policy()
    AttentionInterface.register(PACKED, ignores_packing)
    try:
        with pytest.raises(ConfigError, match=r"see each other"):
            check_packing(model)
    finally:
        register()


def test_a_forward_that_drops_what_a_sequence_should_see_is_refused() -> None:
    model = packed_policy()

    def first_positions_only(ids: torch.Tensor, positions: torch.Tensor, **arguments: Any) -> Any:
        # A sequence that shares a line reads its prompt at the wrong positions.
        is_packed = len(arguments["samples"]) > 1
        return model(ids, torch.zeros_like(positions) if is_packed else positions, **arguments)

    with pytest.raises(ConfigError, match="differ from separate ones"):
        check_packing(model, forward=first_positions_only)
