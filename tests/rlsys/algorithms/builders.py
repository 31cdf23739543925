"""Tokens for the tests of the losses, and the losses again as slow loops over Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsys.algorithms.losses import cispo, decoupled_ppo, dppo_tv, ppo_clip, reinforce, sapo
from rlsys.algorithms.second_moment import m2po
from rlsys.algorithms.sequence_losses import gspo
from rlsys.algorithms.tokens import PolicyTokens, TokenLoss

Loss = Callable[[PolicyTokens], TokenLoss]


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def make_tokens(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    sequences: Tensor | None = None,
    proximal_logprobs: Tensor | None = None,
) -> PolicyTokens:
    """By default, every token counts and is a completion of its own."""
    mask = torch.ones_like(logprobs) if mask is None else mask
    sequences = torch.arange(logprobs.numel()).view(logprobs.shape) if sequences is None else sequences
    return PolicyTokens(logprobs, behavior_logprobs, advantages, mask, sequences, proximal_logprobs)


def gradient(loss: Callable[[PolicyTokens], TokenLoss], tokens: PolicyTokens) -> Tensor:
    """The gradient of the sum of all token losses."""
    logprobs = tokens.logprobs.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(replace(tokens, logprobs=logprobs)).loss.sum(), logprobs)
    return result


@dataclass(frozen=True)
class FlatToken:
    """One token as Python floats."""

    pi: float
    mu: float
    proximal: float
    advantage: float
    sequence: int


def random_tokens(seed: int = 0, completions: int = 6, spread: float = 0.3, *, proximal: bool = True) -> PolicyTokens:
    """Packed completions of 1 to 9 tokens, in order of completion, between prompts whose tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[tuple[int, bool]] = []
    for number in range(completions):
        parts += [(number, False)] * int(torch.randint(0, 4, (1,), generator=generator))
        parts += [(number, True)] * int(torch.randint(1, 10, (1,), generator=generator))
    size = len(parts)
    behavior = -2 * torch.rand(size, generator=generator, dtype=torch.float64) - 0.05
    drift = spread * torch.randn(2, size, generator=generator, dtype=torch.float64)
    of_completion = torch.randn(completions, generator=generator, dtype=torch.float64)
    sequences = torch.tensor([number for number, _ in parts])
    mask = torch.tensor([float(counts) for _, counts in parts], dtype=torch.float64)
    return PolicyTokens(
        logprobs=(behavior + drift[0]).clamp(max=-1e-3),
        behavior_logprobs=behavior,
        advantages=of_completion[sequences],
        mask=mask,
        sequences=torch.where(mask > 0, sequences, torch.full_like(sequences, -1)),
        proximal_logprobs=(behavior + drift[1]).clamp(max=-1e-3) if proximal else None,
    )


def flat_tokens(tokens: PolicyTokens) -> list[FlatToken | None]:
    """The tokens one by one; None where the mask is 0."""
    fields = (tokens.logprobs, tokens.behavior_logprobs, tokens.proximal, tokens.advantages, tokens.sequences)
    columns = [field.detach().flatten().tolist() for field in fields]
    rows = zip(*columns, strict=True)
    return [FlatToken(*row) if counts > 0 else None
            for row, counts in zip(rows, tokens.mask.flatten().tolist(), strict=True)]  # fmt: skip


# ------------------------------------------------------------------ slow losses: value and d loss / d log π of a token


def _clip(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """PPO case by case: on which side of the interval, with which sign of the advantage."""
    if advantage >= 0 and ratio > 1 + high:
        return -(1 + high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


def slow_reinforce(token: FlatToken, _: list[FlatToken]) -> tuple[float, float]:
    return -token.advantage * token.pi, -token.advantage


def slow_ppo(token: FlatToken, _: list[FlatToken]) -> tuple[float, float]:
    return _clip(math.exp(token.pi - token.mu), token.advantage, 0.1, 0.25)


def slow_dual_clip(token: FlatToken, _: list[FlatToken]) -> tuple[float, float]:
    value, slope = _clip(math.exp(token.pi - token.mu), token.advantage, 0.1, 0.25)
    if token.advantage < 0 and value > 1.4 * -token.advantage:
        return 1.4 * -token.advantage, 0.0
    return value, slope


def slow_decoupled(token: FlatToken, _: list[FlatToken]) -> tuple[float, float]:
    weight = min(math.exp(token.proximal - token.mu), 1.2)
    value, slope = _clip(math.exp(token.pi - token.proximal), token.advantage, 0.1, 0.25)
    return weight * value, weight * slope


def slow_dppo(token: FlatToken, _: list[FlatToken]) -> tuple[float, float]:
    ratio, shift = math.exp(token.pi - token.mu), math.exp(token.pi) - math.exp(token.mu)
    stopped = shift > 0.1 if token.advantage > 0 else shift < -0.1
    value = slope = 0.0 if stopped else -ratio * token.advantage
    return value + 0.5 * (token.pi - token.mu) ** 2, slope + (token.pi - token.mu)


def slow_cispo(token: FlatToken, _: list[FlatToken]) -> tuple[float, float]:
    weight = min(max(math.exp(token.pi - token.mu), 0.8), 1.3)
    return -weight * token.advantage * token.pi, -weight * token.advantage


def slow_sapo(token: FlatToken, _: list[FlatToken]) -> tuple[float, float]:
    tau = 1.0 if token.advantage > 0 else 1.05
    ratio = math.exp(token.pi - token.mu)
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    return -4 / tau * gate * token.advantage, -4 * gate * (1 - gate) * ratio * token.advantage


def slow_gspo(token: FlatToken, everything: list[FlatToken]) -> tuple[float, float]:
    own = [other.pi - other.mu for other in everything if other.sequence == token.sequence]
    return _clip(math.exp(sum(own) / len(own)), token.advantage, 0.05, 0.1)


def slow_m2po(token: FlatToken, _: list[FlatToken]) -> tuple[float, float]:
    log_ratio = token.pi - token.mu
    outward = log_ratio > 0 if token.advantage > 0 else log_ratio < 0
    value = 0.0 if outward and abs(log_ratio) > 0.25 else -math.exp(log_ratio) * token.advantage
    return value, value


SlowLoss = Callable[[FlatToken, list[FlatToken]], tuple[float, float]]

LOSSES: dict[str, tuple[Loss, SlowLoss]] = {
    "reinforce": (reinforce, slow_reinforce),
    "ppo_clip": (lambda t: ppo_clip(t, epsilon_low=0.1, epsilon_high=0.25), slow_ppo),
    "dual_clip": (lambda t: ppo_clip(t, epsilon_low=0.1, epsilon_high=0.25, dual_clip=1.4), slow_dual_clip),
    "decoupled_ppo": (
        lambda t: decoupled_ppo(t, epsilon_low=0.1, epsilon_high=0.25, weight_cap=1.2),
        slow_decoupled,
    ),
    "dppo": (lambda t: dppo_tv(t, delta=0.1, tau=0.5), slow_dppo),
    "cispo": (lambda t: cispo(t, epsilon_low=0.2, epsilon_high=0.3), slow_cispo),
    "sapo": (sapo, slow_sapo),
    "gspo": (lambda t: gspo(t, epsilon_low=0.05, epsilon_high=0.1), slow_gspo),
    "m2po": (lambda t: m2po(t, threshold=0.25), slow_m2po),
}
"""Every loss with bounds that random tokens reach on both sides, and its slow twin."""
