import math

import pytest
import torch

from rlsys.algorithms.sft import nll


def test_the_loss_is_the_negative_log_likelihood_of_unmasked_tokens() -> None:
    logprobs = torch.tensor([math.log(0.5), -math.inf, math.log(0.1)], requires_grad=True)
    loss = nll(logprobs, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(loss.loss, torch.tensor([math.log(2), 0.0, math.log(10)]))
    loss.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1, 0, -1]
    assert loss.diagnostics["clipped"].tolist() == [0, 0, 0]


def test_arguments_of_different_shapes_are_refused() -> None:
    with pytest.raises(AssertionError, match="one shape"):
        nll(torch.zeros(2, 3), torch.zeros(3))
