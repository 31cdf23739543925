import math

import torch

from rlsys.algorithms.losses import ppo_clip
from rlsys.algorithms.sequence_losses import gspo
from tests.rlsys.algorithms.builders import gradient, logs, make_tokens, random_tokens, values


def test_gspo_clips_the_geometric_mean_of_a_completions_ratios() -> None:
    # Completion 0: ρ = 2 and 1/8, s = sqrt(1/4) = 0.5. Completion 7: ρ = 1.5 alone. A = 1, -1; clip to [0.8, 1.2].
    # Completion 0, A = 1: min(0.5, 0.8) = 0.5; completion 7, A = -1: min(-1.5, -1.2) = -1.5.
    tokens = make_tokens(logs(0.4, 0.3, 0.05), logs(0.2, 0.2, 0.4), values(1, -1, 1), sequences=torch.tensor([0, 7, 0]))
    loss = gspo(tokens, epsilon_low=0.2, epsilon_high=0.2)
    torch.testing.assert_close(loss.loss, values(-0.5, 1.5, -0.5))
    assert loss.diagnostics["clipped"].tolist() == [0, 0, 0]
    # Each token has the gradient -s·A of its own log π, and none of its neighbours'.
    torch.testing.assert_close(gradient(lambda t: gspo(t, epsilon_low=0.2, epsilon_high=0.2), tokens),
                               values(-0.5, 1.5, -0.5))  # fmt: skip


def test_gspo_stops_whole_completions() -> None:
    # ρ = 2 and 0.9: s = sqrt(1.8) = 1.342 > 1.2, so the second token is stopped though its own ratio is inside.
    tokens = make_tokens(logs(0.4, 0.18), logs(0.2, 0.2), values(1, 1), sequences=torch.tensor([3, 3]))
    loss = gspo(tokens, epsilon_low=0.2, epsilon_high=0.2)
    torch.testing.assert_close(loss.loss, values(-1.2, -1.2))
    assert loss.diagnostics["clipped"].tolist() == [1, 1]
    assert gradient(lambda t: gspo(t, epsilon_low=0.2, epsilon_high=0.2), tokens).tolist() == [0, 0]


def test_tokens_that_do_not_count_are_not_in_the_mean() -> None:
    tokens = make_tokens(
        logs(0.4, 0.001, 0.1), logs(0.2, 0.9, 0.2), values(1, 1, 1), values(1, 0, 1), torch.tensor([0, 0, 0])
    )
    # ρ = 2 and 0.5: s = 1
    torch.testing.assert_close(gspo(tokens).loss, values(-1, 0, -1))


def test_the_default_bounds_are_those_of_a_mean() -> None:
    # log s = ±2.9e-4 inside; 4.1e-4 and -3.1e-4 outside
    behavior = values(-1, -1, -1, -1)
    drift = values(2.9e-4, 4.1e-4, -2.9e-4, -3.1e-4)
    loss = gspo(make_tokens(behavior + drift, behavior, values(1, 1, -1, -1)))
    assert loss.diagnostics["clipped"].tolist() == [0, 1, 0, 1]


def test_gspo_of_completions_of_one_token_is_ppo() -> None:
    tokens = random_tokens(2)
    single = make_tokens(tokens.logprobs, tokens.behavior_logprobs, tokens.advantages, tokens.mask)
    for epsilon in (0.05, 0.2):
        sequence, token = (
            lambda t, e=epsilon: gspo(t, epsilon_low=e, epsilon_high=e),
            lambda t, e=epsilon: ppo_clip(t, epsilon_low=e, epsilon_high=e),
        )
        torch.testing.assert_close(sequence(single).loss, token(single).loss)
        torch.testing.assert_close(gradient(sequence, single), gradient(token, single))


def test_a_small_mean_of_many_float32_ratios_is_exact_enough_for_the_bounds() -> None:
    # 10,000 tokens with log ρ = 1e-4 ± 0.1: the mean is 1e-4, and summing in float32 could miss it by the bounds' size.
    behavior = torch.full((10_000,), -1.0)
    drift = torch.tensor([0.1001, -0.0999]).repeat(5_000)
    tokens = make_tokens(behavior + drift, behavior, torch.ones(10_000), sequences=torch.zeros(10_000).long())
    exact = math.exp(float((tokens.logprobs.double() - tokens.behavior_logprobs.double()).mean()))
    assert abs(-float(gspo(tokens).loss[0]) - exact) < 1e-6
