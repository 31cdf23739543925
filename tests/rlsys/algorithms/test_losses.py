import math

import torch

from rlsys.algorithms.losses import cispo, decoupled_ppo, dppo_tv, ppo_clip, reinforce, sapo
from tests.rlsys.algorithms.builders import gradient, logs, make_tokens, random_tokens, values


def test_reinforce_weighs_log_probabilities_with_advantages() -> None:
    # -A log π: -2 log 0.5 = 1.3863, 1 log 0.25 = -1.3863
    loss = reinforce(make_tokens(logs(0.5, 0.25), logs(0.1, 0.9), values(2.0, -1.0)))
    torch.testing.assert_close(loss.loss, values(2 * math.log(2), -2 * math.log(2)))
    assert loss.diagnostics["clipped"].tolist() == [0, 0]


def test_ppo_clips_the_ratio_where_that_lowers_the_gain() -> None:
    # ρ = 1.5, 1.5, 0.5, 0.5, 1.1; A = 1, -1, 1, -1, 1; clip to [0.8, 1.3].
    # min(ρA, clip A): min(1.5, 1.3), min(-1.5, -1.3), min(0.5, 0.8), min(-0.5, -0.8), 1.1
    tokens = make_tokens(logs(0.3, 0.3, 0.1, 0.1, 0.22), logs(0.2, 0.2, 0.2, 0.2, 0.2), values(1, -1, 1, -1, 1))
    loss = ppo_clip(tokens, epsilon_low=0.2, epsilon_high=0.3)
    torch.testing.assert_close(loss.loss, values(-1.3, 1.5, -0.5, 0.8, -1.1))
    assert loss.diagnostics["clipped"].tolist() == [1, 0, 0, 1, 0]


def test_ppo_gives_clipped_tokens_no_gradient() -> None:
    # d(-ρA)/d log π = -ρA: 0 where clipped, 1.5 where A = -1
    tokens = make_tokens(logs(0.3, 0.3), logs(0.2, 0.2), values(1, -1))
    torch.testing.assert_close(gradient(ppo_clip, tokens), values(0, 1.5))


def test_clip_higher_lets_tokens_rise_further_and_fall_as_before() -> None:
    # ρ = 1.25 is stopped at 1.2 and not at 1.28; ρ = 0.75 with A < 0 is stopped at 0.8 by both
    tokens = make_tokens(logs(0.25, 0.15), logs(0.2, 0.2), values(1, -1))
    assert ppo_clip(tokens).diagnostics["clipped"].tolist() == [1, 1]
    assert ppo_clip(tokens, epsilon_high=0.28).diagnostics["clipped"].tolist() == [0, 1]


def test_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    # ρ = 5: the loss for A = -2 is 10 without and 3·2 = 6 with the bound; for A = 2 it is -2.4 in both.
    tokens = make_tokens(logs(0.5, 0.5, 0.25), logs(0.1, 0.1, 0.1), values(-2, 2, -2))
    torch.testing.assert_close(ppo_clip(tokens).loss, values(10, -2.4, 5))
    bounded = ppo_clip(tokens, dual_clip=3.0)
    torch.testing.assert_close(bounded.loss, values(6, -2.4, 5))
    assert bounded.diagnostics["clipped"].tolist() == [1, 1, 0]
    torch.testing.assert_close(gradient(lambda t: ppo_clip(t, dual_clip=3.0), tokens), values(0, 0, 5))


def test_decoupled_ppo_clips_round_the_proximal_policy_and_weighs_with_the_rest() -> None:
    # r = π/π_prox = 1.5, clipped to 1.2; w = π_prox/μ = 2, and 10 capped to 5; A = 1, -1
    tokens = make_tokens(logs(0.3, 0.3), logs(0.1, 0.02), values(1, -1), proximal_logprobs=logs(0.2, 0.2))
    loss = decoupled_ppo(tokens)
    torch.testing.assert_close(loss.loss, values(2 * -1.2, 5 * 1.5))
    torch.testing.assert_close(loss.diagnostics["weight"], values(2, 5))
    assert loss.diagnostics["clipped"].tolist() == [1, 0]
    # the weight has no gradient of its own: w·(-rA)
    torch.testing.assert_close(gradient(decoupled_ppo, tokens), values(0, 7.5))


def test_decoupled_ppo_whose_proximal_policy_is_the_sampler_is_ppo() -> None:
    tokens = random_tokens(1)
    at_sampler = make_tokens(
        tokens.logprobs, tokens.behavior_logprobs, tokens.advantages, tokens.mask, tokens.sequences,
        proximal_logprobs=tokens.behavior_logprobs,
    )  # fmt: skip
    torch.testing.assert_close(decoupled_ppo(at_sampler).loss, ppo_clip(tokens).loss)
    torch.testing.assert_close(gradient(decoupled_ppo, at_sampler), gradient(ppo_clip, tokens))


def test_dppo_stops_tokens_that_moved_too_far_in_the_direction_of_their_advantage() -> None:
    # π - μ = 0.3, 0.3, -0.3, -0.3, 0.1; A = 1, -1, 1, -1, 1; δ = 0.2: tokens 0 and 3 are stopped.
    # ρ = 4, 4, 0.25, 0.25, 2: -M ρ A = 0, 4, -0.25, 0, -2
    tokens = make_tokens(logs(0.4, 0.4, 0.1, 0.1, 0.2), logs(0.1, 0.1, 0.4, 0.4, 0.1), values(1, -1, 1, -1, 1))
    loss = dppo_tv(tokens, delta=0.2, tau=0.0)
    torch.testing.assert_close(loss.loss, values(0, 4, -0.25, 0, -2))
    assert loss.diagnostics["clipped"].tolist() == [1, 0, 0, 1, 0]


def test_dppo_lets_rare_tokens_move_further_than_ppo_does() -> None:
    # From 0.001 to 0.01 the ratio is 10, yet only 0.009 of probability moved.
    tokens = make_tokens(logs(0.01), logs(0.001), values(1.0))
    assert dppo_tv(tokens).diagnostics["clipped"].tolist() == [0]
    assert ppo_clip(tokens).diagnostics["clipped"].tolist() == [1]


def test_dppo_pulls_every_token_towards_the_sampling_policy_also_the_stopped_ones() -> None:
    # τ (log ρ)² with τ = 0.5: (log 4)²/2 = 0.9609; the first token is stopped, its policy term is 0.
    loss = dppo_tv(make_tokens(logs(0.4, 0.1), logs(0.1, 0.1), values(1.0, 1.0)), delta=0.2, tau=0.5)
    torch.testing.assert_close(loss.loss, values(0.5 * math.log(4) ** 2, -1.0))
    torch.testing.assert_close(loss.diagnostics["kl_penalty"], values(0.5 * math.log(4) ** 2, 0.0))
    # Its gradient is 2 τ log ρ = log 4: downhill is back to μ.
    pulled = gradient(lambda t: dppo_tv(t, delta=0.2, tau=0.5), make_tokens(logs(0.4), logs(0.1), values(1.0)))
    torch.testing.assert_close(pulled, values(math.log(4)))


def test_the_default_bound_of_dppo_is_a_fifth_of_probability() -> None:
    # π - μ = 0.19 and 0.21 with A = 1; and the mirror image with A = -1
    loss = dppo_tv(make_tokens(logs(0.49, 0.51, 0.31, 0.29), logs(0.3, 0.3, 0.5, 0.5), values(1, 1, -1, -1)))
    assert loss.diagnostics["clipped"].tolist() == [0, 1, 0, 1]
    # and the default weight of the pull 1e-3
    torch.testing.assert_close(loss.diagnostics["kl_penalty"][1], 1e-3 * values(math.log(0.51 / 0.3))[0].square())


def test_cispo_clips_weights_and_keeps_all_gradients() -> None:
    # ρ = 4, 0.25, 1.5; weights clipped to [0, 3] by default; gradient -weight·A, also where PPO has none
    tokens = make_tokens(logs(0.4, 0.1, 0.3), logs(0.1, 0.4, 0.2), values(1, -1, 1))
    loss = cispo(tokens)
    torch.testing.assert_close(loss.loss, values(-3 * math.log(0.4), 0.25 * math.log(0.1), -1.5 * math.log(0.3)))
    assert loss.diagnostics["clipped"].tolist() == [1, 0, 0]
    torch.testing.assert_close(gradient(cispo, tokens), values(-3, 0.25, -1.5))
    assert cispo(tokens, epsilon_low=0.5).diagnostics["clipped"].tolist() == [1, 1, 0]


def test_sapo_gates_the_gradient_by_the_sigmoid_of_the_ratio() -> None:
    # ρ = 2, A = 1, τ = 1: sigmoid(1) = 0.731059; loss -4·0.731059, gradient -8·0.731059·0.268941
    # ρ = 2, A = -1, τ = 1.05: sigmoid(1.05) = 0.740775; loss 4/1.05·0.740775, gradient 8·0.740775·0.259225
    tokens = make_tokens(logs(0.4, 0.4), logs(0.2, 0.2), values(1, -1))
    torch.testing.assert_close(sapo(tokens).loss, values(-2.9242343, 2.8219996), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(sapo, tokens), values(-1.5728955, 1.5362117), rtol=1e-5, atol=0)
    torch.testing.assert_close(sapo(tokens).diagnostics["gate"], values(0.7864477, 0.7681059), rtol=1e-5, atol=0)


def test_sapo_fades_out_tokens_that_became_far_more_probable() -> None:
    # ρ = 30: the gate is 4·exp(-29), about 1e-12; PPO without a clip would have the gradient 30
    tokens = make_tokens(logs(0.3), logs(0.01), values(1.0))
    assert 0 < -gradient(sapo, tokens).item() < 1e-10
