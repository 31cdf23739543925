import math
import pickle
from dataclasses import replace
from typing import get_args

import pytest
import torch

from rlsys.algorithms.combinations import WEIGHTS, incompatible
from rlsys.algorithms.corrections import icepop, sequence_mask, tis
from rlsys.algorithms.losses import cispo, decoupled_ppo, dppo_tv, ppo_clip, reinforce, sapo
from rlsys.algorithms.objective import PolicyObjective
from rlsys.algorithms.regularisers import kl
from rlsys.algorithms.second_moment import m2po, outward_log_ratios
from rlsys.algorithms.sequence_losses import gspo
from rlsys.algorithms.tokens import PolicyTokens
from rlsys.config_grpo import (
    CispoLoss,
    Correction,
    DecoupledPpoLoss,
    DppoLoss,
    GrpoConfig,
    GspoLoss,
    IcePopCorrection,
    KlConfig,
    Loss,
    M2poLoss,
    PpoClipLoss,
    ReinforceLoss,
    SapoLoss,
    SequenceMaskCorrection,
    TruncatedCorrection,
)
from tests.rlsys.algorithms.builders import Loss as LossFunction
from tests.rlsys.algorithms.builders import gradient, logs, make_tokens, random_tokens, values

# Every configured loss with values that are no default, and the function it stands for.
CONFIGURED: list[tuple[Loss, LossFunction]] = [
    (DppoLoss(kind="dppo", delta=0.1, tau=0.5), lambda t: dppo_tv(t, delta=0.1, tau=0.5)),
    (ReinforceLoss(kind="reinforce"), reinforce),
    (PpoClipLoss(kind="ppo_clip", epsilon_low=0.1, epsilon_high=0.25, dual_clip=1.4),
     lambda t: ppo_clip(t, epsilon_low=0.1, epsilon_high=0.25, dual_clip=1.4)),
    (DecoupledPpoLoss(kind="decoupled_ppo", epsilon_low=0.1, epsilon_high=0.25, weight_cap=1.2),
     lambda t: decoupled_ppo(t, epsilon_low=0.1, epsilon_high=0.25, weight_cap=1.2)),
    (GspoLoss(kind="gspo", epsilon_low=0.05, epsilon_high=0.1), lambda t: gspo(t, epsilon_low=0.05, epsilon_high=0.1)),
    (CispoLoss(kind="cispo", epsilon_low=0.2, epsilon_high=0.3), lambda t: cispo(t, epsilon_low=0.2, epsilon_high=0.3)),
    (SapoLoss(kind="sapo", tau_positive=1.5, tau_negative=2.0), lambda t: sapo(t, tau_positive=1.5, tau_negative=2.0)),
    (M2poLoss(kind="m2po", tau=0.02), lambda t: m2po(t, threshold=0.25)),
]  # fmt: skip
CORRECTIONS = {
    "tis": (TruncatedCorrection(kind="tis", cap=1.1), lambda t: tis(t, cap=1.1)),
    "tis of sequences": (TruncatedCorrection(kind="tis", cap=1.2, level="sequence"),
                         lambda t: tis(t, cap=1.2, level="sequence")),
    "icepop": (IcePopCorrection(kind="icepop", low=0.8, high=1.2), lambda t: icepop(t, low=0.8, high=1.2)),
    "sequence_mask": (SequenceMaskCorrection(kind="sequence_mask", low=0.9, high=1.1),
                      lambda t: sequence_mask(t, low=0.9, high=1.1)),
}  # fmt: skip
every_loss = pytest.mark.parametrize(("loss", "function"), CONFIGURED, ids=[loss.kind for loss, _ in CONFIGURED])
every_correction = pytest.mark.parametrize("name", CORRECTIONS)
TIS = TruncatedCorrection(kind="tis", cap=1e6)


def test_every_loss_and_correction_of_the_configuration_is_tried_here() -> None:
    assert {type(loss) for loss, _ in CONFIGURED} == set(get_args(get_args(Loss)[0]))
    assert {type(correction) for correction, _ in CORRECTIONS.values()} == set(get_args(get_args(Correction)[0]))


@every_loss
def test_without_a_correction_the_objective_is_the_configured_loss(loss: Loss, function: LossFunction) -> None:
    tokens = random_tokens(1)
    threshold = 0.25 if isinstance(loss, M2poLoss) else None
    result, expected = PolicyObjective(loss)(tokens, threshold=threshold), function(tokens)
    torch.testing.assert_close(result.loss, expected.loss, rtol=0, atol=0)
    assert result.diagnostics.keys() == expected.diagnostics.keys()


@every_loss
@every_correction
def test_the_step_from_the_sampler_to_the_policy_is_counted_once(loss: Loss, function: LossFunction, name: str) -> None:
    correction, weights_of = CORRECTIONS[name]
    if incompatible(loss.kind, correction.kind):
        with pytest.raises(AssertionError, match=correction.kind):
            PolicyObjective(loss, correction)
        return
    tokens = random_tokens(1)
    assert tokens.proximal_logprobs is not None
    # A weight contains π_prox/μ, so the loss starts from π_prox; a mask contains nothing.
    seen = replace(tokens, behavior_logprobs=tokens.proximal_logprobs) if correction.kind in WEIGHTS else tokens
    weights = weights_of(tokens)
    objective = PolicyObjective(loss, correction)
    result = objective(tokens, threshold=0.25 if isinstance(loss, M2poLoss) else None)
    torch.testing.assert_close(result.loss, weights * function(seen).loss)
    torch.testing.assert_close(result.diagnostics["weight"], weights)
    masked = (weights == 0) & (tokens.mask > 0)
    torch.testing.assert_close(result.diagnostics["masked"], masked.double())


@pytest.mark.parametrize("loss", [loss for loss, _ in CONFIGURED if incompatible(loss.kind, "tis") is None])
def test_with_one_step_per_batch_a_weighed_loss_is_importance_weighted_reinforce(loss: Loss) -> None:
    # The gradient is -(π/μ)·A·∇log π for each of them: no square of the ratio, and no missing ratio either.
    tokens = replace(random_tokens(1), proximal_logprobs=None)
    expected = -(tokens.logprobs - tokens.behavior_logprobs).exp() * tokens.advantages * tokens.mask
    torch.testing.assert_close(gradient(PolicyObjective(loss, TIS), tokens), expected)


def test_a_weighed_loss_is_the_loss_to_the_sampler_in_value() -> None:
    # Inside all bounds, (π_prox/μ)·(π/π_prox) = π/μ.
    tokens = random_tokens(1, spread=0.01)
    loss = PpoClipLoss(kind="ppo_clip")
    torch.testing.assert_close(PolicyObjective(loss, TIS)(tokens).loss, PolicyObjective(loss)(tokens).loss)
    torch.testing.assert_close(gradient(PolicyObjective(loss, TIS), tokens), gradient(PolicyObjective(loss), tokens))


def test_penalty_and_bonus_are_added_and_the_correction_does_not_touch_them() -> None:
    # ρ = 10, masked by IcePop: the policy loss is 0. KL k2 = (log 2)²/2, weight 0.5; entropy 1.5, weight 0.1.
    tokens = make_tokens(logs(0.4), logs(0.04), values(1.0))
    objective = PolicyObjective(
        PpoClipLoss(kind="ppo_clip"), IcePopCorrection(kind="icepop"), KlConfig(weight=0.5, estimator="k2"), 0.1
    )
    result = objective(tokens, reference_logprobs=logs(0.2), entropies=values(1.5))
    torch.testing.assert_close(result.loss, values(0.5 * math.log(2) ** 2 / 2 - 0.15))
    assert result.diagnostics["masked"].tolist() == [1]
    torch.testing.assert_close(result.diagnostics["kl"], values(math.log(2) ** 2 / 2))
    torch.testing.assert_close(result.diagnostics["entropy"], values(1.5))


def test_entropy_is_reported_without_a_bonus_too() -> None:
    objective = PolicyObjective(ReinforceLoss(kind="reinforce"))
    tokens = make_tokens(logs(0.4, 0.4), logs(0.4, 0.4), values(1, 1), values(1, 0))
    result = objective(tokens, entropies=values(1.5, math.nan))
    torch.testing.assert_close(result.loss, reinforce(tokens).loss)
    assert result.diagnostics["entropy"].tolist() == [1.5, 0]


def test_the_gradient_of_the_whole_objective_is_the_sum_of_its_parts() -> None:
    tokens = random_tokens(2)
    reference = tokens.behavior_logprobs - 0.3
    objective = PolicyObjective(PpoClipLoss(kind="ppo_clip"), None, KlConfig(weight=0.7), 0.0)
    whole = gradient(lambda t: objective(t, reference_logprobs=reference), tokens)
    logprobs = tokens.logprobs.clone().requires_grad_()
    (penalty,) = torch.autograd.grad(kl(logprobs, reference, tokens.mask, "k3").sum(), logprobs)
    torch.testing.assert_close(whole, gradient(ppo_clip, tokens) + 0.7 * penalty)


def test_diagnostics_carry_no_gradient_and_nothing_of_masked_tokens() -> None:
    tokens = random_tokens(3)
    nan = torch.where(tokens.mask > 0, tokens.logprobs, torch.full_like(tokens.mask, math.nan)).requires_grad_()
    objective = PolicyObjective(PpoClipLoss(kind="ppo_clip"), CORRECTIONS["icepop"][0], KlConfig(weight=1.0), 0.1)
    result = objective(replace(tokens, logprobs=nan), reference_logprobs=nan.detach() - 0.1, entropies=nan.detach())
    assert {"clipped", "weight", "masked", "kl", "entropy"} == result.diagnostics.keys()
    for diagnostic in (*result.diagnostics.values(), result.loss):
        assert (diagnostic[tokens.mask == 0] == 0).all()
        assert diagnostic.requires_grad == (diagnostic is result.loss)
    (slope,) = torch.autograd.grad(result.loss.sum(), nan)
    assert (slope[tokens.mask == 0] == 0).all()
    assert torch.isfinite(slope).all()


def test_what_an_objective_needs_follows_from_the_configuration() -> None:
    plain = PolicyObjective.from_config(GrpoConfig(steps=1))
    assert plain.loss == DppoLoss(kind="dppo")
    assert (plain.needs_reference, plain.needs_entropies, plain.needs_step_threshold) == (False, False, False)
    rich = PolicyObjective.from_config(
        GrpoConfig(
            steps=1,
            loss=M2poLoss(kind="m2po"),
            correction=SequenceMaskCorrection(kind="sequence_mask"),
            kl=KlConfig(weight=0.1),
            entropy_weight=0.01,
        )
    )
    assert (rich.needs_reference, rich.needs_entropies, rich.needs_step_threshold) == (True, True, True)
    tokens = random_tokens(1)
    with pytest.raises(AssertionError, match="threshold"):
        rich(tokens, reference_logprobs=tokens.logprobs, entropies=tokens.logprobs)
    with pytest.raises(AssertionError, match="reference"):
        rich(tokens, entropies=tokens.logprobs, threshold=1.0)
    with pytest.raises(AssertionError, match="entropies"):
        rich(tokens, reference_logprobs=tokens.logprobs, threshold=1.0)


@every_loss
def test_an_objective_crosses_process_borders(loss: Loss, function: LossFunction) -> None:
    objective = PolicyObjective(loss, CORRECTIONS["sequence_mask"][0], KlConfig(weight=0.1), 0.01)
    assert pickle.loads(pickle.dumps(objective)) == objective


def test_the_threshold_of_m2po_is_that_of_the_tokens_that_the_correction_leaves() -> None:
    tokens = random_tokens(5, completions=12)
    masking = CORRECTIONS["sequence_mask"][0]
    objective = PolicyObjective(M2poLoss(kind="m2po", tau=0.02), masking)
    weights = sequence_mask(tokens, low=0.9, high=1.1)
    assert 0 < weights.sum() < tokens.mask.sum()
    left = PolicyTokens(*(field[weights > 0] for field in (
        tokens.logprobs, tokens.behavior_logprobs, tokens.advantages, tokens.mask, tokens.sequences,
    )))  # fmt: skip
    log_ratios = objective.step_log_ratios(tokens)
    torch.testing.assert_close(log_ratios, outward_log_ratios(left))
    threshold = objective.step_threshold(log_ratios)
    result = objective(tokens, threshold=threshold)
    kept = log_ratios[log_ratios <= threshold]
    assert 0 < len(kept) < len(log_ratios)
    assert kept.square().mean() <= 0.02
    clipped = (result.diagnostics["clipped"] > 0) & (weights > 0)
    assert int(clipped.sum()) == len(log_ratios) - len(kept)
