"""What holds for every loss, whatever its formula."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.aggregation import Aggregation, sample_weights
from rlsys.algorithms.tokens import PolicyTokens
from tests.rlsys.algorithms.builders import (
    LOSSES,
    flat_tokens,
    gradient,
    logs,
    make_tokens,
    random_tokens,
    values,
)

every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
@pytest.mark.parametrize("seed", range(4))
def test_a_loss_is_what_a_slow_loop_over_its_formula_gives(name: str, seed: int) -> None:
    loss, slow = LOSSES[name]
    tokens = random_tokens(seed)
    flat = flat_tokens(tokens)
    counting = [token for token in flat if token is not None]
    expected = [(0.0, 0.0) if token is None else slow(token, counting) for token in flat]
    torch.testing.assert_close(loss(tokens).loss, values(*(value for value, _ in expected)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(loss, tokens), values(*(slope for _, slope in expected)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"reinforce", "sapo"}))  # which hold no token back
def test_the_random_tokens_are_on_both_sides_of_the_trust_region(name: str) -> None:
    clipped = torch.cat([LOSSES[name][0](random_tokens(seed)).diagnostics["clipped"] for seed in range(4)])
    assert 0.02 < clipped.mean() < 0.9


@every_loss
def test_at_ratio_1_the_gradient_is_that_of_reinforce(name: str) -> None:
    logprobs, advantages = logs(0.9, 0.3, 0.05), values(1.5, -2.0, 0.0)
    tokens = make_tokens(logprobs, logprobs, advantages)
    torch.testing.assert_close(gradient(LOSSES[name][0], tokens), -advantages)


@every_loss
def test_masked_tokens_have_no_loss_no_gradient_and_no_diagnostics(name: str) -> None:
    # Also where they hold what padding may hold: infinities and NaN.
    loss = LOSSES[name][0]
    tokens = make_tokens(
        logprobs=values(-1.0, -math.inf, math.nan, -1.0, -1.0).requires_grad_(),
        behavior_logprobs=values(-1.2, -math.inf, 0.0, math.nan, -1.2),
        advantages=values(1.0, 1.0, math.nan, math.inf, math.nan),
        mask=values(1, 0, 0, 0, 0),
        sequences=torch.tensor([3, 3, -1, 0, 3]),
        proximal_logprobs=values(-1.1, math.nan, -math.inf, 0.0, math.inf),
    )
    result = loss(tokens)
    assert result.loss[1:].tolist() == [0] * 4
    slopes = gradient(loss, tokens)
    assert slopes[1:].tolist() == [0] * 4
    for diagnostic in result.diagnostics.values():
        assert diagnostic[1:].tolist() == [0] * 4
        assert not diagnostic.requires_grad
    # and the first is what it is alone
    alone = make_tokens(values(-1.0), values(-1.2), values(1.0), proximal_logprobs=values(-1.1))
    torch.testing.assert_close(result.loss[:1], loss(alone).loss)
    torch.testing.assert_close(slopes[:1], gradient(loss, alone))


@every_loss
def test_a_token_that_the_sampler_found_impossible_gives_a_finite_loss(name: str) -> None:
    loss = LOSSES[name][0]
    tokens = make_tokens(torch.tensor([-0.1]), torch.tensor([-200.0]), torch.tensor([-1.0]))
    assert torch.isfinite(loss(tokens).loss).all()
    assert torch.isfinite(gradient(loss, tokens)).all()


@every_loss
def test_without_any_token_that_counts_there_is_no_loss(name: str) -> None:
    for size in (0, 3):
        zeros = torch.zeros(size)
        tokens = make_tokens(zeros, zeros, zeros, mask=zeros, sequences=torch.full((size,), -1))
        assert LOSSES[name][0](tokens).loss.tolist() == [0.0] * size


def test_tokens_of_different_shapes_are_refused() -> None:
    square, column = torch.zeros(2, 3), torch.zeros(2, 1)
    with pytest.raises(AssertionError, match="one shape"):
        PolicyTokens(square, square, column, square, square.long())
    with pytest.raises(AssertionError, match="one shape"):
        PolicyTokens(square, square, square, square, square.long(), proximal_logprobs=column)


# Not of cispo, whose weight has no gradient by design. The value of a gspo completion is the mean over its tokens.
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"cispo"}))
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_derivative_of_the_loss(name: str, seed: int) -> None:
    tokens = random_tokens(seed)  # random: no token lies on a kink
    sizes = {number: int((tokens.sequences == number).sum()) for number in set(tokens.sequences.tolist())}
    weights = values(*(1 / sizes[number] for number in tokens.sequences.tolist()))
    held = tokens.proximal

    def step_loss(logprobs: Tensor) -> Tensor:
        return (weights * LOSSES[name][0](replace(tokens, logprobs=logprobs, proximal_logprobs=held)).loss).sum()

    assert torch.autograd.gradcheck(step_loss, tokens.logprobs.clone().requires_grad_(), eps=1e-7, atol=1e-6)


# ------------------------------------------------------------------ micro-batches, ranks, packing, padding


def completions_of(tokens: PolicyTokens) -> list[PolicyTokens]:
    """Each completion alone, its prompt left out."""
    parts: list[PolicyTokens] = []
    for number in sorted(set(tokens.sequences[tokens.mask > 0].tolist())):
        parts.append(_select(tokens, (tokens.sequences == number).nonzero()[:, 0]))
    return parts


def _select(tokens: PolicyTokens, places: Tensor) -> PolicyTokens:
    assert tokens.proximal_logprobs is not None
    return PolicyTokens(
        tokens.logprobs[places],
        tokens.behavior_logprobs[places],
        tokens.advantages[places],
        tokens.mask[places],
        tokens.sequences[places],
        tokens.proximal_logprobs[places],
    )


def _padded(parts: list[PolicyTokens], left: int) -> PolicyTokens:
    """The completions as rows of one [B, T] tensor, padded with NaN on both sides."""
    width = left + max(len(part.mask) for part in parts) + 2

    def rows(field: str, filler: float) -> Tensor:
        columns = [getattr(part, field) for part in parts]
        full = torch.full((len(parts), width), filler, dtype=columns[0].dtype)
        for row, column in zip(full, columns, strict=True):
            row[left : left + len(column)] = column
        return full

    nan = math.nan
    return PolicyTokens(
        rows("logprobs", nan),
        rows("behavior_logprobs", nan),
        rows("advantages", nan),
        rows("mask", 0),
        rows("sequences", -1),
        rows("proximal_logprobs", nan),
    )


def step_loss(name: str, batches: list[PolicyTokens], weights: dict[int, float]) -> tuple[Tensor, Tensor]:
    """The weighted sum over all micro-batches, and its derivative for a common factor of all log π."""
    factor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    total = torch.tensor(0.0, dtype=torch.float64)
    for batch in batches:
        of_token = values(*(weights.get(number, 0.0) for number in batch.sequences.flatten().tolist()))
        of_counting = torch.where(batch.mask > 0, factor, torch.zeros_like(factor))
        result = LOSSES[name][0](replace(batch, logprobs=batch.logprobs * of_counting))
        total = total + (of_token.view(result.loss.shape) * result.loss).sum()
    return total, torch.autograd.grad(total, factor)[0]


@every_loss
@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean", "constant"])
def test_packing_padding_micro_batches_and_ranks_change_nothing(name: str, kind: Aggregation) -> None:
    tokens = random_tokens(seed=5, completions=9)
    parts = completions_of(tokens)
    sizes = [len(part.mask) for part in parts]
    factors = sample_weights(sizes, kind, num_trajectories=12, max_new_tokens=16, step_tokens=sum(sizes))
    weights = dict(zip(range(9), factors, strict=True))
    expected, slope = step_loss(name, [tokens], weights)
    assert abs(expected.item()) > 1e-3

    shuffled = _select(tokens, torch.randperm(len(tokens.mask), generator=torch.Generator().manual_seed(1)))
    splits = {
        "one by one": parts,
        "two ranks of padded rows": [_padded(parts[:5], left=2), _padded(parts[5:], left=0)],
        "three ranks": [_padded(parts[rank::3], left=rank) for rank in range(3)],
        "interleaved": [shuffled],
        "an empty micro-batch": [tokens, replace(tokens, mask=torch.zeros_like(tokens.mask))],
    }
    for split, batches in splits.items():
        loss, gradient_of_factor = step_loss(name, batches, weights)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13, msg=split)
        torch.testing.assert_close(gradient_of_factor, slope, rtol=1e-12, atol=1e-12, msg=split)
