"""The policy under ZeRO-3: ranks whose batches hold unlike numbers of sequences and targets stay in step."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsys.models.dna_llm import DnaLlm, sequence_inputs
from rlsys.models.lora import LoraOptions, apply_lora, merged_state_dict
from rlsys.models.packed_attention import PACKED
from rlsys.models.packing_check import check_packing
from tests.rlsys.models.tiny_models import VOCABULARY, features, prompt, tiny_policy

pytestmark = pytest.mark.slow
RANKS, STEPS, LEARNING_RATE = 2, 2, 0.05


def policy(with_lora: bool) -> DnaLlm:
    model = tiny_policy()
    model.set_attn_implementation(PACKED)
    if with_lora:
        apply_lora(model, LoraOptions(r=4, alpha=8), seed=0)
    return model.train()


def batch(rank: int) -> dict[str, Any]:
    """Rank 0 holds two sequences of DNA and 7 targets, rank 1 no DNA and 1 target."""
    if rank:
        return sequence_inputs([11, 12, 13], [], [], [14])
    one = prompt([5, 3])
    arrays = [torch.from_numpy(features(5, 1)), torch.from_numpy(features(3, 2))]
    return sequence_inputs(one.token_ids, one.slots, arrays, range(20, 27))


def loss_of(forward: Callable[..., Any], rank: int) -> torch.Tensor:
    targets = sum(len(batch(other)["target_ids"]) for other in range(RANKS))
    return -forward(**batch(rank), max_logits=2 * VOCABULARY).logprobs.sum() / targets


def train_alone(with_lora: bool) -> dict[str, torch.Tensor]:
    model = policy(with_lora)
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad], LEARNING_RATE
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        sum(loss_of(model, rank) for rank in range(RANKS)).backward()
        optimizer.step()
    return dict(merged_state_dict(model))


def train_rank(rank: int, port: int, with_lora: bool, out: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK="0",
        DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first use otherwise
    deepspeed.init_distributed("gloo")
    model = policy(with_lora)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, config=settings, model_parameters=trainable, optimizer=torch.optim.SGD(trainable, LEARNING_RATE)
    )
    check_packing(engine.module, forward=engine)
    for _ in range(STEPS):
        engine.backward(loss_of(engine, rank) * RANKS, scale_wrt_gas=False)
        # A micro-batch without targets, as it pads a rank that has fewer micro-batches than another.
        nothing = sequence_inputs([11, 12], [], [])
        nothing["predictor_positions"] = nothing["target_ids"] = torch.zeros(0, dtype=torch.long)
        engine.backward(engine(**nothing).logprobs.sum() * 0, scale_wrt_gas=False)
        engine.step()

    def gather(parameters: Any) -> Any:
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)

    weights = dict(merged_state_dict(engine.module, gather=gather))
    if rank == 0:
        save_file(weights, out)


@pytest.mark.parametrize("with_lora", [False, True])
def test_two_ranks_with_unlike_batches_train_as_one_process(tmp_path: Path, with_lora: bool) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    out = tmp_path / "weights.safetensors"
    torch.multiprocessing.spawn(train_rank, (port, with_lora, str(out)), nprocs=RANKS)
    found, expected = load_file(out), train_alone(with_lora)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
