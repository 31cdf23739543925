import math
from typing import get_args

import pytest
import torch

from rlsys.algorithms.regularisers import Estimator, entropy_bonus, kl
from tests.rlsys.algorithms.builders import values

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
ONES = values(1, 1)


@pytest.mark.parametrize(
    ("estimator", "expected", "slope"),
    [
        # x = 0.5 and -1; k2: x²/2; k3: exp(-x) - 1 + x = 0.6065 - 0.5, 2.7183 - 2
        ("k1", (0.5, -1.0), (0.5, -1.0)),
        ("k2", (0.125, 0.5), (0.5, -1.0)),
        ("k3", (math.exp(-0.5) - 0.5, math.e - 2), (1 - math.exp(-0.5), 1 - math.e)),
    ],
)
def test_estimates_and_their_gradients(
    estimator: Estimator, expected: tuple[float, float], slope: tuple[float, float]
) -> None:
    logprobs, reference = values(-1.5, -3).requires_grad_(), values(-2, -2)
    divergence = kl(logprobs, reference, ONES, estimator)
    torch.testing.assert_close(divergence, values(*expected))
    torch.testing.assert_close(torch.autograd.grad(divergence.sum(), logprobs)[0], values(*slope))


LOGITS, REFERENCE = values(0.3, -1.0, 0.8, 0.1), values(-0.2, 0.5, 0.4, 0.0).log_softmax(0)


def expected_gradient(estimator: Estimator) -> torch.Tensor:
    """Of the loss, over the tokens of π: the sum over all tokens of sg(π)·kl, differentiated by the logits."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    loss = (logprobs.detach().exp() * kl(logprobs, REFERENCE, torch.ones(4), estimator)).sum()
    return torch.autograd.grad(loss, logits)[0]


def true_gradient(forward: bool) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    terms = REFERENCE.exp() * (REFERENCE - logprobs) if forward else logprobs.exp() * (logprobs - REFERENCE)
    return torch.autograd.grad(terms.sum(), logits)[0]


def test_in_expectation_k1_and_k2_have_the_gradient_of_the_penalised_divergence_and_k3_that_of_its_reverse() -> None:
    torch.testing.assert_close(expected_gradient("k1"), true_gradient(forward=False))
    torch.testing.assert_close(expected_gradient("k2"), true_gradient(forward=False))
    torch.testing.assert_close(expected_gradient("k3"), true_gradient(forward=True))
    assert (true_gradient(forward=True) - true_gradient(forward=False)).abs().max() > 0.05


def test_in_expectation_k1_and_k3_have_the_value_of_the_divergence() -> None:
    logprobs = LOGITS.log_softmax(0)
    divergence = (logprobs.exp() * (logprobs - REFERENCE)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close(
            (logprobs.exp() * kl(logprobs, REFERENCE, torch.ones(4), estimator)).sum(), divergence
        )


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_gradient_is_the_derivative(estimator: Estimator) -> None:
    logprobs = values(-1.5, -3.2, -0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl(x, values(-2, -2, -1), torch.ones(3), estimator), logprobs)


@every_estimator
def test_equal_policies_are_no_divergence(estimator: Estimator) -> None:
    logprobs = values(-1.5, -3).requires_grad_()
    divergence = kl(logprobs, logprobs.detach(), ONES, estimator)
    assert divergence.tolist() == [0, 0]
    assert torch.autograd.grad(divergence.sum(), logprobs)[0].tolist() == [0, 0]


@every_estimator
def test_masked_tokens_are_not_penalised(estimator: Estimator) -> None:
    logprobs = values(-1, -math.inf, math.nan, -1).requires_grad_()
    divergence = kl(logprobs, values(-2, -1, -1, math.nan), values(1, 0, 0, 0), estimator)
    assert divergence[1:].tolist() == [0, 0, 0]
    assert torch.autograd.grad(divergence.sum(), logprobs)[0][1:].tolist() == [0, 0, 0]


@every_estimator
def test_a_token_that_the_reference_finds_impossible_gives_a_finite_penalty(estimator: Estimator) -> None:
    logprobs = torch.tensor([-0.1, -300.0], requires_grad=True)
    divergence = kl(logprobs, torch.tensor([-300.0, -0.1]), torch.ones(2), estimator)
    assert torch.isfinite(divergence).all()
    assert torch.isfinite(torch.autograd.grad(divergence.sum(), logprobs)[0]).all()


def test_a_tiny_divergence_is_not_rounded_away() -> None:
    # x = 1e-4 in float32: k3 = x²/2 = 5e-9
    divergence = kl(torch.tensor([0.0]) + 1e-4, torch.tensor([0.0]), torch.ones(1), "k3")
    assert divergence.item() == pytest.approx(5e-9, rel=0.02)


def test_the_entropy_bonus_lowers_the_loss_where_tokens_count() -> None:
    entropies = values(0.5, math.nan, 2).requires_grad_()
    bonus = entropy_bonus(entropies, values(1, 0, 1), 0.1)
    torch.testing.assert_close(bonus, values(-0.05, 0, -0.2))
    torch.testing.assert_close(torch.autograd.grad(bonus.sum(), entropies)[0], values(-0.1, 0, -0.1))
