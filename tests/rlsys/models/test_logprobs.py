from __future__ import annotations

import math

import pytest
import torch

from rlsys.models.logprobs import token_logprobs

HIDDEN = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
HEAD = torch.tensor([[0.0, 0.0], [math.log(2.0), 0.0], [0.0, math.log(3.0)]], dtype=torch.float64)
"""Logits are [0, h0 log 2, h1 log 3]: unnormalised probabilities 1, 2^h0, 3^h1."""


def test_logprobs_and_entropies_equal_values_by_hand() -> None:
    logprobs, entropies = token_logprobs(HIDDEN, HEAD, None, torch.tensor([1, 2, 0]))
    # Row 0: (1, 2, 1)/4. Row 1: (1, 1, 9)/11. Row 2: (1, 2, 3)/6.
    assert logprobs.tolist() == pytest.approx([math.log(2 / 4), math.log(9 / 11), math.log(1 / 6)], rel=1e-5)
    distributions = ((1 / 4, 2 / 4, 1 / 4), (1 / 11, 1 / 11, 9 / 11), (1 / 6, 2 / 6, 3 / 6))
    by_hand = [-sum(p * math.log(p) for p in row) for row in distributions]
    assert entropies.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_the_temperature_divides_the_logits() -> None:
    logprobs, _ = token_logprobs(HIDDEN, HEAD, None, torch.tensor([1, 2, 0]), temperature=0.5)
    # Probabilities are squared: (1, 4, 1)/6, (1, 1, 81)/83, (1, 4, 9)/14.
    assert logprobs.tolist() == pytest.approx([math.log(4 / 6), math.log(81 / 83), math.log(1 / 14)], rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_neither_values_nor_gradients_depend_on_the_chunk(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator, requires_grad=True)
    weight = torch.randn(17, 6, generator=generator, requires_grad=True)
    bias = torch.randn(17, generator=generator, requires_grad=True)
    targets = torch.randint(17, (11,), generator=generator)
    scale = torch.randn(11, generator=generator)
    logits = torch.nn.functional.linear(hidden, weight, bias) / 0.7
    expected = torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad((expected * scale).sum(), (hidden, weight, bias))
    logprobs, entropies = token_logprobs(hidden, weight, bias, targets, temperature=0.7, max_logits=chunk * len(weight))
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy())
    assert not entropies.requires_grad
    for mine, theirs in zip(
        torch.autograd.grad((logprobs * scale).sum(), (hidden, weight, bias)), gradients, strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_no_targets_give_a_zero_gradient_and_no_values() -> None:
    weight = torch.ones(4, 3, requires_grad=True)
    logprobs, entropies = token_logprobs(torch.zeros(0, 3), weight, None, torch.zeros(0, dtype=torch.long))
    assert (logprobs.shape, entropies.shape) == ((0,), (0,))
    logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
