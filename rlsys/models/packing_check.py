"""Proof, at start-up, that packed sequences do not see each other, and that all see the prompt that they share.

An attention implementation that ignores how a line is packed gives a plausible loss and a wrong gradient, so the
learner runs this before its first step, on the very module and attention implementation that it will train.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsys.data.packing import MicroBatch, pack
from rlsys.errors import ConfigError
from rlsys.models.dna_llm import DnaLlm, DnaLlmOutput, attention_implementation
from rlsys.types import Prompt, TrainSample

_PROMPT_LENGTHS = (7, 4)
_CONTINUATION_LENGTHS = ((5, 3), (6,))
"""Of the samples behind each prompt."""
# Mean |difference| of log-probabilities, packed against separate: kernels may add up in another order.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_LOW_PRECISION_TOLERANCE = 0.1


def check_packing(model: DnaLlm, forward: Callable[..., DnaLlmOutput] | None = None) -> None:
    """Raise ConfigError unless packed sequences give what separate ones give.

    Two tests on three random sequences, two of which share a prompt; forward only. Other tokens in the neighbours must
    not change a sequence's log-probabilities by a single bit: the shapes and so the kernels stay the same, and what is
    not seen weighs exactly 0. And the packed line must equal the sequences run one by one, up to the precision of the
    weights. `forward` is what runs the model where that is not the module itself (the DeepSpeed engine; all ranks must
    call).
    """
    run = forward or model
    draw = np.random.default_rng(0)
    vocabulary = int(model.language_model.config.vocab_size)
    samples = _random_samples(vocabulary, draw)
    was_training = model.training
    model.eval()
    try:
        packed = _logprobs(run, samples, model.device)
        alone = torch.cat([_logprobs(run, [sample], model.device) for sample in samples])
        others = _random_samples(vocabulary, draw)
        first_moved = _logprobs(run, [_like(samples[0], others[0]), *samples[1:]], model.device)
        last_moved = _logprobs(run, [*samples[:-1], others[-1]], model.device)
    finally:
        model.train(was_training)
    implementation = attention_implementation(model)
    first, last = len(samples[0].continuation_ids_T), len(samples[-1].continuation_ids_T)
    leaks = torch.cat([first_moved[first:] - packed[first:], last_moved[:-last] - packed[:-last]])
    if leaks.any():
        leak = float(leaks.abs().max())
        raise ConfigError(
            f"packed sequences see each other with attention implementation {implementation!r} (log-probabilities move "
            f"by {leak:.2g} when a neighbour changes): the loss would be wrong."
        )
    difference = float((packed - alone).abs().mean())
    tolerance = _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE)
    if not difference <= tolerance:
        raise ConfigError(
            f"packed sequences differ from separate ones by {difference:.2g} nats a token (allowed: {tolerance:g}) "
            f"with attention implementation {implementation!r}: the loss would be wrong."
        )


def packed_arguments(batch: MicroBatch, device: torch.device | str) -> dict[str, Tensor]:
    """The forward arguments of a micro-batch: all but its features."""

    def tensor(array: NDArray[np.int64]) -> Tensor:
        # Arrays from shared memory are read-only; a copy is what torch may safely hold.
        return torch.from_numpy(np.array(array)).to(device)

    return {
        "input_ids": tensor(batch.input_ids_T)[None],
        "position_ids": tensor(batch.position_ids_T)[None],
        "samples": tensor(batch.samples_BL),
        "places": tensor(batch.places_T),
        "slots": torch.tensor([(0, slot.start, slot.length) for slot in batch.slots], dtype=torch.long).reshape(-1, 3),
        "predictor_positions": tensor(batch.predictors_N),
        "target_ids": tensor(batch.input_ids_T[batch.loss_tokens_N]),
    }


def _random_samples(vocabulary: int, draw: np.random.Generator) -> list[TrainSample]:
    samples: list[TrainSample] = []
    for group, (width, lengths) in enumerate(zip(_PROMPT_LENGTHS, _CONTINUATION_LENGTHS, strict=True)):
        prompt = Prompt("check", tuple(int(token) for token in draw.integers(vocabulary, size=width)), ())
        samples += [_sample(group, prompt, draw.integers(vocabulary, size=length)) for length in lengths]
    return samples


def _like(sample: TrainSample, other: TrainSample) -> TrainSample:
    """`other`'s continuation behind the prompt of `sample`."""
    return _sample(sample.group, sample.prompt, other.continuation_ids_T)


def _sample(group: int, prompt: Prompt, ids_T: NDArray[np.int64]) -> TrainSample:
    zeros_T, ones_T = np.zeros(len(ids_T), dtype=np.float32), np.ones(len(ids_T), dtype=np.float32)
    return TrainSample(group, prompt, ids_T, zeros_T, zeros_T.astype(np.int64), ones_T, 1.0, 1.0)


@torch.no_grad()
def _logprobs(run: Callable[..., DnaLlmOutput], samples: list[TrainSample], device: torch.device) -> Tensor:
    """Log-probabilities of the continuations, in order, packed into one line."""
    ((batch,),) = pack(samples, micro_batch_tokens=64, num_ranks=1, pad_token_id=0)
    arguments = packed_arguments(batch, device)
    # In the order of the samples: the packing may put a longer group first.
    order = torch.from_numpy(np.argsort(batch.sequences_N, kind="stable"))
    output = run(arguments.pop("input_ids"), arguments.pop("position_ids"), **arguments)
    assert output.logprobs is not None, "targets were given"
    return output.logprobs.float().cpu()[order]
