"""LoRA on the policy's language model, and the plain weights that rollout workers and checkpoints read.

The learner applies the adapters after loading the policy and before DeepSpeed wraps it; publishing and saving merge
them on the way out. Invariant: whoever reads weights sees plain names and merged values, never an adapter, so that
LoRA and full fine-tuning are read in the same way outside the learner.

Merged values are those of the learner up to rounding. In bf16, where the learner computes with W and B A apart, their
sum rounded to bf16 makes engine and learner differ by about 1e-2 nats a token at equal version, which is within the
gate of 3e-2 (`train/mismatch_abs_mean`); in float32, and without adapters, both hold the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from rlsys.errors import ConfigError
from rlsys.models.dna_llm import DnaLlm

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Makes partitioned parameters whole while the context lasts: under ZeRO-3
`lambda parameters: deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)`."""

_ADAPTER = "default"


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters: W + (alpha / r) B A, with A [r, in] random and B [out, r] zero at first (Hu et al. 2021)."""

    r: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    """Last names of the linear layers to adapt; None: all of the language model but the head."""


def no_gather(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """The `Gather` of parameters that are whole already (no ZeRO, and ZeRO 1 and 2)."""
    return nullcontext()


def apply_lora(model: DnaLlm, options: LoraOptions, seed: int) -> None:
    """Add adapters to `model.language_model` in place and freeze the rest of it; the projector stays trainable.

    Raises ConfigError when a name in `target_modules` matches no linear layer.
    """
    language_model = model.language_model
    head = model.get_output_embeddings()
    linears = {
        name: name.rsplit(".", 1)[-1]
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    wanted = set(options.target_modules or linears.values())
    if unknown := sorted(wanted - set(linears.values())):
        raise ConfigError(
            f"lora.target_modules: {', '.join(unknown)} name no linear layer of this model; "
            f"it has {', '.join(sorted(set(linears.values())))}"
        )
    config = LoraConfig(
        r=options.r,
        lora_alpha=cast(int, options.alpha),  # peft declares an int and computes with any number
        lora_dropout=options.dropout,
        target_modules=[name for name, last in linears.items() if last in wanted],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, language_model, adapter_name=_ADAPTER)


@torch.no_grad()
def merged_state_dict(
    model: nn.Module, *, dtype: torch.dtype | None = None, gather: Gather = no_gather
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor on the CPU) of every parameter under its plain name, adapters merged, the model unchanged.

    Adapters are merged in float32 and then cast to `dtype` (None: the parameter's own). Tensors are copies, made one
    module at a time. A tied head is left out: whoever loads ties it again. Under ZeRO-3 every rank must iterate to the
    end, because `gather` is collective.
    """
    seen: set[int] = set()
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    for name, module in model.named_modules():
        if any(name.startswith(f"{adapter}.") for adapter in adapters):
            continue
        if name in adapters:
            yield from _merged_linear(name, adapters[name], dtype, gather)
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            with gather([parameter]):
                tensor = _copy(parameter, dtype or parameter.dtype)
            yield (f"{name}.{key}" if name else key), tensor


def _merged_linear(
    name: str, layer: LoraLinear, dtype: torch.dtype | None, gather: Gather
) -> Iterator[tuple[str, Tensor]]:
    base = cast(nn.Linear, layer.get_base_layer())
    down, up = cast(nn.Linear, layer.lora_A[_ADAPTER]), cast(nn.Linear, layer.lora_B[_ADAPTER])
    scaling = float(layer.scaling[_ADAPTER])
    with gather([_parameter(base), _parameter(down), _parameter(up)]):
        merged = base.weight.float() + scaling * (up.weight.float() @ down.weight.float())
        weight = _copy(merged, dtype or base.weight.dtype)
    yield f"{name}.weight", weight
    bias = cast("nn.Parameter | None", base.bias)
    if bias is not None:
        with gather([bias]):
            tensor = _copy(bias, dtype or bias.dtype)
        yield f"{name}.bias", tensor


def _parameter(linear: nn.Linear) -> nn.Parameter:
    return cast(nn.Parameter, linear.weight)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
