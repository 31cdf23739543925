import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlsys.algorithms.corrections import icepop, sequence_mask, tis
from rlsys.algorithms.tokens import PolicyTokens
from tests.rlsys.algorithms.builders import flat_tokens, logs, make_tokens, random_tokens, values

CORRECTIONS: dict[str, Callable[[PolicyTokens], Tensor]] = {
    "tis": lambda t: tis(t, cap=1.3),
    "tis of sequences": lambda t: tis(t, cap=1.6, level="sequence"),
    "icepop": lambda t: icepop(t, low=0.8, high=1.3),
    "sequence_mask": lambda t: sequence_mask(t, low=0.95, high=1.05),
}
every_correction = pytest.mark.parametrize("name", CORRECTIONS)


def with_proximal(proximal: Tensor, behavior: Tensor, sequences: Tensor | None = None) -> PolicyTokens:
    """log π is far off, so that a correction which reads it is found out."""
    ones = torch.ones_like(behavior)
    return make_tokens(-9 * ones, behavior, ones, sequences=sequences, proximal_logprobs=proximal)


def test_tis_truncates_the_weight_of_each_token() -> None:
    # The weights are 2.5, 2 and 0.5.
    tokens = with_proximal(logs(0.5, 0.2, 0.1), logs(0.2, 0.1, 0.2))
    torch.testing.assert_close(tis(tokens, cap=2.2), values(2.2, 2, 0.5))
    torch.testing.assert_close(tis(tokens, cap=math.inf), values(2.5, 2, 0.5))


def test_tis_of_sequences_truncates_the_product() -> None:
    # Completion 0: 2.5·2 = 5, truncated to 3; completion 1: 0.5
    tokens = with_proximal(logs(0.5, 0.1, 0.2), logs(0.2, 0.2, 0.1), sequences=torch.tensor([0, 1, 0]))
    torch.testing.assert_close(tis(tokens, cap=3.0, level="sequence"), values(3, 0.5, 3))


def test_icepop_leaves_tokens_outside_the_interval_out() -> None:
    # The weights are 6, 4, 0.6 and 0.4.
    tokens = with_proximal(logs(0.6, 0.4, 0.06, 0.04), logs(0.1, 0.1, 0.1, 0.1))
    torch.testing.assert_close(icepop(tokens), values(0, 4, 0.6, 0))


def test_sequence_masks_look_at_the_geometric_mean() -> None:
    # Completion 0: 2 and 0.5, mean 1, kept though neither token is near 1. Completion 1: 1.02, left out.
    tokens = with_proximal(logs(0.4, 0.102, 0.1), logs(0.2, 0.1, 0.2), sequences=torch.tensor([0, 1, 0]))
    assert sequence_mask(tokens).tolist() == [1, 0, 1]
    assert sequence_mask(tokens, high=1.03).tolist() == [1, 1, 1]


def test_without_proximal_log_probabilities_the_current_policy_stands_for_them() -> None:
    tokens = make_tokens(logs(0.3).requires_grad_(), logs(0.2), values(1.0))
    weight = tis(tokens)
    torch.testing.assert_close(weight, values(1.5))
    assert not weight.requires_grad


def slow_weight(name: str, tokens: PolicyTokens) -> list[float]:
    flat = flat_tokens(tokens)
    weights: list[float] = []
    for token in flat:
        if token is None:
            weights.append(0.0)
            continue
        own = [t.proximal - t.mu for t in flat if t is not None and t.sequence == token.sequence]
        w = math.exp(token.proximal - token.mu)
        match name:
            case "tis":
                weights.append(min(w, 1.3))
            case "tis of sequences":
                weights.append(min(math.prod(math.exp(x) for x in own), 1.6))
            case "icepop":
                weights.append(w if 0.8 <= w <= 1.3 else 0.0)
            case _:
                weights.append(1.0 if 0.95 <= math.exp(sum(own) / len(own)) <= 1.05 else 0.0)
    return weights


@every_correction
@pytest.mark.parametrize("seed", range(4))
def test_a_weight_is_what_a_slow_loop_over_its_formula_gives(name: str, seed: int) -> None:
    tokens = random_tokens(seed, spread=0.2)
    expected = slow_weight(name, tokens)
    torch.testing.assert_close(CORRECTIONS[name](tokens), values(*expected), rtol=1e-12, atol=0)


@every_correction
def test_the_random_weights_are_changed_and_unchanged(name: str) -> None:
    # The test above would pass over weights of 1 without looking at any bound.
    weights = torch.cat([CORRECTIONS[name](tokens)[tokens.mask > 0] for tokens in map(random_tokens, range(4))])
    bound = {"tis": 1.3, "tis of sequences": 1.6, "icepop": 0.0, "sequence_mask": 0.0}[name]
    assert 0.05 < (weights == bound).double().mean() < 0.95


@every_correction
def test_equal_policies_have_weight_1_and_masked_tokens_0(name: str) -> None:
    nan = math.nan
    tokens = make_tokens(
        values(-9, -9, nan, nan), values(-1, -2, nan, -math.inf), values(1, 1, nan, nan), values(1, 1, 0, 0),
        torch.tensor([2, 2, 2, -1]), proximal_logprobs=values(-1, -2, 0, nan),
    )  # fmt: skip
    assert CORRECTIONS[name](tokens).tolist() == [1, 1, 0, 0]


@every_correction
def test_weights_do_not_depend_on_the_order_of_tokens(name: str) -> None:
    tokens = random_tokens(4)
    order = torch.randperm(len(tokens.mask), generator=torch.Generator().manual_seed(0))
    assert tokens.proximal_logprobs is not None
    shuffled = PolicyTokens(
        tokens.logprobs[order], tokens.behavior_logprobs[order], tokens.advantages[order], tokens.mask[order],
        tokens.sequences[order], tokens.proximal_logprobs[order],
    )  # fmt: skip
    torch.testing.assert_close(CORRECTIONS[name](shuffled), CORRECTIONS[name](tokens)[order], rtol=1e-12, atol=0)


@every_correction
def test_a_token_that_the_sampler_found_impossible_gives_a_finite_weight(name: str) -> None:
    assert torch.isfinite(CORRECTIONS[name](with_proximal(torch.tensor([-0.1]), torch.tensor([-200.0])))).all()
