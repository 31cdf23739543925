import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys.algorithms.losses import TokenLoss, dppo_tv, ppo_clip, reinforce
from rlsys.data.packing import MicroBatch, pack
from tests.rlsys.groups import make_sample

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]
LOSSES: list[Loss] = [reinforce, ppo_clip, dppo_tv]


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def ones(number: int) -> Tensor:
    return torch.ones(number, dtype=torch.float64)


def gradient(loss: Loss, logprobs: Tensor, behavior: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    logprobs = logprobs.clone().requires_grad_()
    loss(logprobs, behavior, advantages, mask).loss.sum().backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    return logprobs.grad


def test_reinforce_weighs_log_probabilities_with_advantages() -> None:
    # -A log π: -2 log 0.5 = 1.3863, 1 log 0.25 = -1.3863
    loss = reinforce(logs(0.5, 0.25), logs(0.1, 0.9), values(2.0, -1.0), ones(2))
    torch.testing.assert_close(loss.loss, values(2 * math.log(2), -2 * math.log(2)))
    assert loss.diagnostics["clipped"].tolist() == [0, 0]


def test_ppo_clips_the_ratio_where_that_lowers_the_gain() -> None:
    # ρ = 1.5, 1.5, 0.5, 0.5, 1.1; A = 1, -1, 1, -1, 1; clip to [0.8, 1.3].
    # min(ρA, clip A): min(1.5, 1.3), min(-1.5, -1.3), min(0.5, 0.8), min(-0.5, -0.8), 1.1
    behavior = logs(0.2, 0.2, 0.2, 0.2, 0.2)
    logprobs = logs(0.3, 0.3, 0.1, 0.1, 0.22)
    loss = ppo_clip(logprobs, behavior, values(1, -1, 1, -1, 1), ones(5), clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(loss.loss, values(-1.3, 1.5, -0.5, 0.8, -1.1))
    assert loss.diagnostics["clipped"].tolist() == [1, 0, 0, 1, 0]


def test_ppo_gives_clipped_tokens_no_gradient() -> None:
    behavior, logprobs = logs(0.2, 0.2), logs(0.3, 0.3)
    # d(-ρA)/d log π = -ρA: 0 where clipped, 1.5 where A = -1
    torch.testing.assert_close(gradient(ppo_clip, logprobs, behavior, values(1, -1), ones(2)), values(0, 1.5))


def test_dppo_stops_tokens_that_moved_too_far_in_the_direction_of_their_advantage() -> None:
    # π - μ = 0.3, 0.3, -0.3, -0.3, 0.1; A = 1, -1, 1, -1, 1; δ = 0.2: tokens 0 and 3 are stopped.
    # ρ = 4, 4, 0.25, 0.25, 2: -M ρ A = 0, 4, -0.25, 0, -2
    behavior = logs(0.1, 0.1, 0.4, 0.4, 0.1)
    logprobs = logs(0.4, 0.4, 0.1, 0.1, 0.2)
    loss = dppo_tv(logprobs, behavior, values(1, -1, 1, -1, 1), ones(5), delta=0.2, tau=0.0)
    torch.testing.assert_close(loss.loss, values(0, 4, -0.25, 0, -2))
    assert loss.diagnostics["clipped"].tolist() == [1, 0, 0, 1, 0]


def test_dppo_lets_rare_tokens_move_further_than_ppo_does() -> None:
    # From 0.001 to 0.01 the ratio is 10, yet only 0.009 of probability moved.
    arguments = logs(0.01), logs(0.001), values(1.0), ones(1)
    assert dppo_tv(*arguments).diagnostics["clipped"].tolist() == [0]
    assert ppo_clip(*arguments).diagnostics["clipped"].tolist() == [1]


def test_dppo_pulls_every_token_towards_the_sampling_policy_also_the_stopped_ones() -> None:
    # τ (log ρ)² with τ = 0.5: (log 4)²/2 = 0.9609; the first token is stopped, its policy term is 0.
    loss = dppo_tv(logs(0.4, 0.1), logs(0.1, 0.1), values(1.0, 1.0), ones(2), delta=0.2, tau=0.5)
    torch.testing.assert_close(loss.loss, values(0.5 * math.log(4) ** 2, -1.0))
    torch.testing.assert_close(loss.diagnostics["kl_penalty"], values(0.5 * math.log(4) ** 2, 0.0))
    # Its gradient is 2 τ log ρ = log 4: downhill is back to μ.
    pulled = gradient(lambda *a: dppo_tv(*a, delta=0.2, tau=0.5), logs(0.4), logs(0.1), values(1.0), ones(1))
    torch.testing.assert_close(pulled, values(math.log(4)))


def test_the_default_bound_is_a_fifth_of_probability() -> None:
    # π - μ = 0.19 and 0.21 with A = 1; and the mirror image with A = -1
    loss = dppo_tv(logs(0.49, 0.51, 0.31, 0.29), logs(0.3, 0.3, 0.5, 0.5), values(1, 1, -1, -1), ones(4))
    assert loss.diagnostics["clipped"].tolist() == [0, 1, 0, 1]
    # and the default weight of the pull 1e-3
    torch.testing.assert_close(loss.diagnostics["kl_penalty"][1], 1e-3 * values(math.log(0.51 / 0.3))[0].square())


@pytest.mark.parametrize("loss", LOSSES)
def test_at_ratio_1_the_gradient_is_that_of_reinforce(loss: Loss) -> None:
    logprobs, advantages = logs(0.9, 0.3, 0.05), values(1.5, -2.0, 0.0)
    torch.testing.assert_close(gradient(loss, logprobs, logprobs, advantages, ones(3)), -advantages)


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_tokens_have_no_loss_no_gradient_and_no_diagnostics(loss: Loss) -> None:
    # Also where they hold what padding may hold: infinities and NaN.
    logprobs = values(-1.0, -math.inf, math.nan, -1.0, -1.0)
    behavior = values(-1.2, -math.inf, 0.0, math.nan, -1.2)
    advantages, mask = values(1.0, 1.0, math.nan, math.inf, math.nan), values(1, 0, 0, 0, 0)
    result = loss(logprobs, behavior, advantages, mask)
    assert result.loss[1:].tolist() == [0] * 4
    assert gradient(loss, logprobs, behavior, advantages, mask)[1:].tolist() == [0] * 4
    for diagnostic in result.diagnostics.values():
        assert diagnostic[1:].tolist() == [0] * 4


@pytest.mark.parametrize("loss", LOSSES)
def test_a_token_that_the_sampler_found_impossible_gives_a_finite_loss(loss: Loss) -> None:
    arguments = torch.tensor([-0.1]), torch.tensor([-200.0]), torch.tensor([-1.0]), torch.ones(1)
    assert torch.isfinite(loss(*arguments).loss).all()
    assert torch.isfinite(gradient(loss, *arguments)).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_arguments_of_different_shapes_are_refused(loss: Loss) -> None:
    with pytest.raises(AssertionError, match="one shape"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2, 3))


def toy_logprobs(ids_BT: Tensor, positions_BT: Tensor, scale: Tensor) -> Tensor:
    """A 'policy' whose log-probabilities depend on the token and its position in its sample, and on one parameter."""
    return -scale * (0.2 + ids_BT.double() / 50 + 0.01 * positions_BT.double())


def batch_loss(loss: Loss, batch: MicroBatch, scale: Tensor) -> Tensor:
    logprobs_BT = toy_logprobs(torch.tensor(batch.input_ids_BT), torch.tensor(batch.position_ids_BT), scale)
    arrays = batch.behavior_logprobs_BT, batch.advantages_BT, batch.loss_mask_BT
    return loss(logprobs_BT, *(torch.tensor(array).double() for array in arrays)).loss.sum()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("row_tokens", "rows", "ranks"), [(40, 1, 1), (25, 2, 1), (60, 3, 2), (200, 1, 3), (24, 8, 4)])
def test_packing_micro_batching_padding_and_ranks_change_nothing(
    loss: Loss, row_tokens: int, rows: int, ranks: int
) -> None:
    samples = [make_sample(group=n // 4, prompt_tokens=3 + n % 5, continuation_tokens=2 + 3 * n % 17, seed=n)
               for n in range(12)]  # fmt: skip
    tokens = sum(len(sample.continuation_ids_T) for sample in samples)
    expected = torch.tensor(0.0, dtype=torch.float64)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for sample in samples:  # one by one, without packing
        start = len(sample.prompt.token_ids)
        positions = torch.arange(start, sample.num_tokens)
        logprobs_T = toy_logprobs(torch.tensor(sample.continuation_ids_T), positions, scale)
        behavior_T = torch.tensor(sample.behavior_logprobs_T).double()
        advantages_T = torch.full_like(logprobs_T, float(np.float32(sample.advantage)))
        one_by_one = loss(logprobs_T, behavior_T, advantages_T, torch.ones_like(logprobs_T))
        expected = expected + one_by_one.loss.sum() / tokens
    (expected_gradient,) = torch.autograd.grad(expected, scale)

    plan = pack(samples, row_tokens=row_tokens, rows_per_micro_batch=rows, num_ranks=ranks, pad_token_id=0)
    micro_batches = [batch for batches in plan for batch in batches]
    assert sum(batch.num_loss_tokens for batch in micro_batches) == tokens
    packed = torch.stack([batch_loss(loss, batch, scale) for batch in micro_batches]).sum() / tokens
    (packed_gradient,) = torch.autograd.grad(packed, scale)
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed_gradient, expected_gradient, rtol=1e-6, atol=0)
