"""Proof, at start-up, that sequences packed into one row do not see each other.

Transformers derives the packed mask from `position_ids` and drops it without a word in several situations (a mask or a
cache is passed, an attention implementation ignores it). The loss then stays plausible and the gradient is wrong, so
the learner runs this before its first step, on the very module and attention implementation that it will train.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlsys.errors import ConfigError
from rlsys.models.dna_llm import DnaLlm, DnaLlmOutput, attention_implementation

_LENGTHS = (7, 12, 5)
# Mean |difference| of log-probabilities, packed against separate: kernels may add up in another order.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_LOW_PRECISION_TOLERANCE = 0.1


def check_packing(model: DnaLlm, forward: Callable[..., DnaLlmOutput] | None = None) -> None:
    """Raise ConfigError unless packed sequences give what separate ones give.

    Two tests on three random sequences, forward only. Other tokens in the neighbours must not change a sequence's
    log-probabilities by a single bit: the shapes and so the kernels stay the same, and a masked token weighs exactly 0.
    And the packed row must equal the sequences run one by one, up to the precision of the weights. `forward` is what
    runs the model where that is not the module itself (the DeepSpeed engine; all ranks must call).
    """
    run = forward or model
    device = model.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.language_model.config.vocab_size)
    sequences = [_random_ids(length, vocabulary, generator) for length in _LENGTHS]
    was_training = model.training
    model.eval()
    try:
        packed = _logprobs(run, sequences, device)
        alone = [_logprobs(run, [sequence], device)[0] for sequence in sequences]
        neighbours = [_random_ids(length, vocabulary, generator) for length in _LENGTHS]
        moved = _logprobs(run, [neighbours[0], sequences[1], neighbours[2]], device)[1]
    finally:
        model.train(was_training)
    implementation = attention_implementation(model)
    if not torch.equal(moved, packed[1]):
        leak = float((moved - packed[1]).abs().max())
        raise ConfigError(
            f"packed sequences see each other with attention implementation {implementation!r} (log-probabilities move "
            f"by {leak:.2g} when a neighbour changes): the loss would be wrong. Use sdpa or flash_attention_2."
        )
    difference = float(torch.cat([a - b for a, b in zip(packed, alone, strict=True)]).abs().mean())
    tolerance = _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE)
    if not difference <= tolerance:
        raise ConfigError(
            f"packed sequences differ from separate ones by {difference:.2g} nats a token (allowed: {tolerance:g}) "
            f"with attention implementation {implementation!r}: the loss would be wrong. Use sdpa or flash_attention_2."
        )


def _random_ids(length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    return torch.randint(vocabulary, (length,), generator=generator)


@torch.no_grad()
def _logprobs(run: Callable[..., DnaLlmOutput], sequences: list[Tensor], device: torch.device) -> list[Tensor]:
    """Log-probabilities of all tokens but the first of each sequence, packed into one row."""
    starts = [sum(len(sequence) for sequence in sequences[:index]) for index in range(len(sequences))]
    predictors = [start + torch.arange(len(one) - 1) for start, one in zip(starts, sequences, strict=True)]
    output = run(
        torch.cat(sequences)[None].to(device),
        torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None].to(device),
        predictor_positions=torch.cat(predictors).to(device),
        target_ids=torch.cat([sequence[1:] for sequence in sequences]).to(device),
    )
    assert output.logprobs is not None, "targets were given"
    return list(torch.split(output.logprobs.float().cpu(), [len(sequence) - 1 for sequence in sequences]))
