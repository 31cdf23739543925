from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config

from rlsys.errors import ConfigError
from rlsys.models.dna_llm import DnaLlm, DnaLlmConfig, register_auto_classes, sequence_inputs
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
    """The three sequences in a batch of two rows: [0, 1, padding] and [2, padding], padding a segment of its own."""
    total = 70
    ids = torch.zeros(2, total, dtype=torch.long)
    positions = torch.arange(total).repeat(2, 1)
    slots, targets, predictors, arrays = [], [], [], []
    cursor = [0, 0]
    for (one, rows, continuation), row in zip(sequences(), (0, 0, 1), strict=True):
        start, length = cursor[row], len(one.token_ids) + len(continuation)
        ids[row, start : start + length] = torch.tensor([*one.token_ids, *continuation])
        positions[row, start : start + length] = torch.arange(length)
        slots += [[row, start + slot.start, slot.length] for slot in one.slots]
        first = row * total + start + len(one.token_ids)
        predictors += range(first - 1, first - 1 + len(continuation))
        targets += continuation
        arrays += rows
        cursor[row] += length
        positions[row, cursor[row] :] = torch.arange(total - cursor[row])
    return {
        "input_ids": ids, "position_ids": positions, "features": arrays, "slots": torch.tensor(slots),
        "predictor_positions": torch.tensor(predictors), "target_ids": torch.tensor(targets),
    }  # fmt: skip


def test_packed_sequences_equal_separate_ones_in_value_and_gradient() -> None:
    model = tiny_policy()
    separate, packed = alone(model), model(**packed_inputs()).logprobs
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    weights = torch.randn(len(separate), generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((separate * weights).sum(), list(model.parameters()))
    for gradient, reference in zip(
        torch.autograd.grad((packed * weights).sum(), list(model.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_logprobs_are_those_of_the_full_logits_at_the_temperature() -> None:
    model = tiny_policy(tied=False)
    inputs = packed_inputs()
    scored = model(**inputs, temperature=0.6, logprob_chunk=3)
    predictors, targets = inputs.pop("predictor_positions"), inputs.pop("target_ids")
    logits = model(**inputs).logits.flatten(0, 1)[predictors] / 0.6
    expected = torch.log_softmax(logits, dim=-1)
    torch.testing.assert_close(scored.logprobs, expected.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(scored.entropies, -(expected.exp() * expected).sum(-1))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_completions_of_a_shared_prompt_equal_separate_sequences(implementation: str) -> None:
    model = tiny_policy()
    model.set_attn_implementation(implementation)
    one, arrays = prompt([5, 3]), [torch.from_numpy(features(5, 1)), torch.from_numpy(features(3, 2))]
    completions = [[11, 12, 13], [14, PAD, 15, 16], [17]]
    expected = torch.cat([model(**sequence_inputs(one.token_ids, one.slots, arrays, c)).logprobs for c in completions])
    length = len(one.token_ids)
    ids, positions, segments = list(one.token_ids), list(range(length)), [0] * length
    predictors: list[int] = []
    for index, completion in enumerate(completions):
        predictors += [length - 1, *range(len(ids), len(ids) + len(completion) - 1)]
        ids += completion
        positions += range(length, length + len(completion))
        segments += [index + 1] * len(completion)
    output = model(
        torch.tensor([ids]), torch.tensor([positions]), arrays,
        torch.tensor([[0, slot.start, slot.length] for slot in one.slots]),
        segment_ids=torch.tensor([segments]), visible_segment_ids=torch.zeros(1, len(ids), dtype=torch.long),
        predictor_positions=torch.tensor(predictors), target_ids=torch.tensor([t for c in completions for t in c]),
    )  # fmt: skip
    torch.testing.assert_close(output.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_the_ids_in_a_slot_are_not_read_and_a_pad_elsewhere_is_a_token() -> None:
    model = tiny_policy()
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
