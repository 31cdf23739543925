from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config

from rlsys.data.packing import pack
from rlsys.errors import ConfigError
from rlsys.models.dna_llm import DnaLlm, DnaLlmConfig, register_auto_classes, sequence_inputs
from rlsys.models.packed_attention import PACKED
from rlsys.models.packing_check import packed_arguments
from rlsys.types import Prompt, TrainSample
from tests.rlsys.models.tiny_models import PAD, VOCABULARY, WIDTH, features, prompt, text_config, tiny_policy

LENGTHS = ((5, 3), (9,), (4,))
"""Feature rows of the slots of three sequences."""


def sequences() -> list[tuple[Any, list[Tensor], list[int]]]:
    """Prompt, features and continuation of three sequences; one continuation holds the pad token."""
    draw = torch.Generator().manual_seed(5)
    out: list[tuple[Any, list[Tensor], list[int]]] = []
    for index, rows in enumerate(LENGTHS):
        arrays = [torch.from_numpy(features(count, 10 * index + k)) for k, count in enumerate(rows)]
        continuation = torch.randint(10, VOCABULARY, (4 + index,), generator=draw).tolist()
        out.append((prompt(rows, seed=index), arrays, [*continuation[:-1], PAD, continuation[-1]]))
    return out


def alone(model: DnaLlm, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of all continuations, each sequence on its own."""
    outputs = [model(**sequence_inputs(p.token_ids, p.slots, a, c), temperature=temperature) for p, a, c in sequences()]
    return torch.cat([output.logprobs for output in outputs])


def packed_inputs() -> dict[str, Any]:
    """The three sequences in one line, as a micro-batch has them, and the features of their slots."""
    samples: list[TrainSample] = []
    arrays: dict[str, Tensor] = {}
    for index, (one, rows, continuation) in enumerate(sequences()):
        keys = [f"{index}-{number}" for number in range(len(rows))]
        slots = tuple(slot._replace(key=key) for slot, key in zip(one.slots, keys, strict=True))
        arrays |= dict(zip(keys, rows, strict=True))
        samples.append(sample(index, Prompt(one.problem_id, one.token_ids, slots), continuation))
    return line(samples, arrays)


def sample(group: int, one: Prompt, continuation: list[int]) -> TrainSample:
    zeros, ones = np.zeros(len(continuation), np.float32), np.ones(len(continuation), np.float32)
    return TrainSample(group, one, np.array(continuation), zeros, zeros.astype(np.int64), ones, 1.0, 1.0)


def line(samples: list[TrainSample], arrays: dict[str, Tensor]) -> dict[str, Any]:
    """Forward arguments of samples packed into one line, their targets in the order of the samples."""
    ((batch,),) = pack(samples, micro_batch_tokens=1000, num_ranks=1, pad_token_id=0)
    arguments: dict[str, Any] = packed_arguments(batch, "cpu")
    order = torch.from_numpy(np.argsort(batch.sequences_N, kind="stable"))
    return arguments | {
        "features": [arrays[slot.key] for slot in batch.slots],
        "predictor_positions": arguments["predictor_positions"][order],
        "target_ids": arguments["target_ids"][order],
    }


def packed_policy(tied: bool = True) -> DnaLlm:
    """A policy with the attention that the learner uses."""
    model = tiny_policy(tied=tied)
    model.set_attn_implementation(PACKED)
    return model


def test_packed_sequences_equal_separate_ones_in_value_and_gradient() -> None:
    # Separate sequences run through torch's own attention, not through ours.
    model, packing = tiny_policy(), packed_policy()
    separate, packed = alone(model), packing(**packed_inputs()).logprobs
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    weights = torch.randn(len(separate), generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((separate * weights).sum(), list(model.parameters()))
    for gradient, reference in zip(
        torch.autograd.grad((packed * weights).sum(), list(packing.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_logprobs_are_those_of_the_full_logits_at_the_temperature() -> None:
    model = packed_policy(tied=False)
    inputs = packed_inputs()
    scored = model(**inputs, temperature=0.6, max_logits=3 * VOCABULARY)
    predictors, targets = inputs.pop("predictor_positions"), inputs.pop("target_ids")
    logits = model(**inputs).logits.flatten(0, 1)[predictors] / 0.6
    expected = torch.log_softmax(logits, dim=-1)
    torch.testing.assert_close(scored.logprobs, expected.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(scored.entropies, -(expected.exp() * expected).sum(-1))


def test_completions_of_a_shared_prompt_equal_separate_sequences_in_value_and_gradient() -> None:
    model, packing = tiny_policy(), packed_policy()
    one, arrays = prompt([5, 3]), [torch.from_numpy(features(5, 1)), torch.from_numpy(features(3, 2))]
    completions = [[11, 12, 13], [14, PAD, 15, 16], [17]]
    expected = torch.cat([model(**sequence_inputs(one.token_ids, one.slots, arrays, c)).logprobs for c in completions])
    keyed = Prompt("p", one.token_ids, tuple(slot._replace(key=str(k)) for k, slot in enumerate(one.slots)))
    inputs = line([sample(0, keyed, c) for c in completions], {str(k): array for k, array in enumerate(arrays)})
    assert inputs["input_ids"].shape == (1, len(one.token_ids) + 8), "the prompt is there once"
    found = packing(**inputs).logprobs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(0))
    references = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    gradients = torch.autograd.grad((found * weights).sum(), list(packing.parameters()))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_entropies_carry_a_gradient_where_it_is_asked_for() -> None:
    model = packed_policy()
    assert not model(**packed_inputs()).entropies.requires_grad
    entropies = model(**packed_inputs(), entropy_gradient=True).entropies
    (gradient,) = torch.autograd.grad(entropies.sum(), [model.get_input_embeddings().weight])
    assert float(gradient.abs().max()) > 0


def test_packed_sequences_are_refused_by_an_attention_that_does_not_know_them() -> None:
    with pytest.raises(ConfigError, match="'sdpa' does not know packed sequences"):
        tiny_policy()(**packed_inputs())


def test_the_ids_in_a_slot_are_not_read_and_a_pad_elsewhere_is_a_token() -> None:
    model = packed_policy()
    inputs = packed_inputs()
    expected = model(**inputs).logprobs
    in_slot, elsewhere = inputs["input_ids"].clone(), inputs["input_ids"].clone()
    row, start, length = inputs["slots"][0].tolist()
    in_slot[row, start : start + length] = 50
    torch.testing.assert_close(model(**inputs | {"input_ids": in_slot}).logprobs, expected, rtol=0, atol=0)
    assert int(inputs["input_ids"][row, 0]) != PAD
    elsewhere[row, 0] = PAD
    other = model(**inputs | {"input_ids": elsewhere}).logprobs
    assert float((other - expected).detach().abs().max()) > 0.01


def test_every_trainable_part_gets_a_gradient_even_without_dna() -> None:
    model = tiny_policy()
    model(**sequence_inputs([11, 12], [], [], [13])).logprobs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(parameter.grad.any() for parameter in model.projector.parameters())  # pyright: ignore


def test_features_of_another_length_than_their_slot_are_refused() -> None:
    one = prompt([5])
    with pytest.raises(AssertionError, match="slot of 7 tokens for 4 feature rows"):
        tiny_policy()(**sequence_inputs(one.token_ids, one.slots, [torch.zeros(4, WIDTH)]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("projector_kind", ["mlp", "linear"])
def test_a_policy_survives_saving_bit_for_bit(tmp_path: Path, tied: bool, projector_kind: str) -> None:
    model = tiny_policy(tied=tied, projector_kind=projector_kind)
    model.save_pretrained(tmp_path)
    register_auto_classes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, DnaLlm)
    assert AutoConfig.from_pretrained(tmp_path).encoder == {"kind": "test"}
    mine, theirs = model.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_a_language_model_whose_head_transforms_logits_is_refused() -> None:
    text = Gemma2Config(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        DnaLlm(DnaLlmConfig(text_config=text, dna_hidden_size=4))


def test_an_unknown_projector_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'mpl'.*mlp.*linear"):
        DnaLlmConfig(text_config=text_config(), projector_kind="mpl")
