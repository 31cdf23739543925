from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlsys.errors import ConfigError
from rlsys.models.packing_check import check_packing
from tests.rlsys.models.tiny_models import tiny_policy


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_attention_keeps_packed_sequences_apart(implementation: str, dtype: torch.dtype) -> None:
    model = tiny_policy().to(dtype=dtype)
    model.set_attn_implementation(implementation)
    model.train()
    check_packing(model)
    assert model.training


def ignores_the_mask(*arguments: Any, **keywords: Any) -> Any:
    """Plain causal attention over the whole row, as a kernel that knows nothing of packing runs it."""
    module, query, key, value, _, *rest = arguments
    return sdpa_attention_forward(module, query, key, value, None, *rest, **keywords | {"is_causal": True})


def test_an_attention_that_ignores_packing_is_refused() -> None:
    AttentionInterface.register("ignores_the_mask", ignores_the_mask)
    model = tiny_policy()
    model.set_attn_implementation("ignores_the_mask")
    with pytest.raises(ConfigError, match=r"see each other.*ignores_the_mask"):
        check_packing(model)


def test_a_forward_that_drops_what_a_sequence_should_see_is_refused() -> None:
    model = tiny_policy()

    def one_position(ids: torch.Tensor, positions: torch.Tensor, **targets: Any) -> Any:
        # Every token its own segment when packed: no sequence sees even itself.
        is_packed = bool((positions[0].diff() < 0).any())
        return model(ids, torch.zeros_like(positions) if is_packed else positions, **targets)

    with pytest.raises(ConfigError, match="differ from separate ones"):
        check_packing(model, forward=one_position)
