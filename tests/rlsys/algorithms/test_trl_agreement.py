"""The same numbers from TRL's own code: losses, aggregations, importance weights and reward scaling.

`GRPOTrainer._compute_loss` and `_generate_and_score_completions` run as they are; generation, scoring and the forward
pass are replaced by prepared tensors. Where the two differ, the test says how and why.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys.algorithms.advantages import group_mean, group_normalized, reinforce_plus_plus
from rlsys.algorithms.aggregation import Aggregation, sample_weights
from rlsys.algorithms.corrections import icepop, sequence_mask, tis
from rlsys.algorithms.objective import PolicyObjective
from rlsys.algorithms.tokens import PolicyTokens
from rlsys.config_grpo import (
    CispoLoss,
    GspoLoss,
    IcePopCorrection,
    KlConfig,
    PpoClipLoss,
    ReinforceLoss,
    SapoLoss,
    TruncatedCorrection,
)

Trl = Callable[..., Any]
LENGTHS = (5, 3, 0, 6, 1)
"""Tokens that count in each of the B completions; one was cut at the limit and masked."""
MAX_NEW_TOKENS = 8
# A number that float32 holds: TRL's torch.where of two Python floats makes the temperatures float32.
SAPO = SapoLoss(kind="sapo", tau_negative=1.0625)
PPO = PpoClipLoss(kind="ppo_clip", epsilon_low=0.1, epsilon_high=0.28)


@pytest.fixture(scope="module")
def trl() -> Trl:
    """A GRPOTrainer with the given settings, and neither model nor data."""
    from trl import GRPOTrainer

    class PreparedTrainer(GRPOTrainer):  # type: ignore[misc, valid-type]
        def __init__(self, **settings: Any) -> None:
            vars(self).update(_defaults() | settings)

        def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
            return self.logprobs, self.entropies, None

        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            count = len(prompts)
            ids = [[1] * length for length in self.lengths]
            return [[1]] * count, ids, None, [""] * count, self.sampling_logprobs, {}, None, None

        def _calculate_rewards(self, *_: Any) -> Tensor:
            return torch.tensor(self.rewards)[:, None]

    return PreparedTrainer


def _defaults() -> dict[str, Any]:
    def same(values: Tensor, **_: Any) -> Tensor:
        return values

    return {
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "ref_model": None,
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"), num_processes=1, process_index=0, gather=same, reduce=same
        ),
        "args": SimpleNamespace(
            use_bias_correction_kl=False, delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.0625,
            steps_per_generation=1, per_device_train_batch_size=8, gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "importance_sampling_level": "token", "beta": 0.0, "loss_type": "grpo", "epsilon_low": 0.1,
        "epsilon_high": 0.28, "use_vllm": False, "vllm_importance_sampling_correction": False,
        "vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": None,
        "current_gradient_accumulation_steps": 1, "max_completion_length": MAX_NEW_TOKENS,
        "_entropy_bonus_enabled": False, "use_adaptive_entropy": False, "_metrics": {"train": defaultdict(list)},
        "environment_factories": None, "environments": None, "tools": None,
        "_tokenizer": SimpleNamespace(pad_token_id=0), "pad_to_multiple_of": None,
        "mask_truncated_completions": False, "num_iterations": 1, "num_generations": 4,
        "multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group", "reward_func_names": ["answer"],
        "reward_weights": torch.ones(1), "_logs": defaultdict(list, rewards=defaultdict(list)),
        "_pending_extra_logs": {}, "_pending_metrics": {}, "log_multimodal": False, "sampling_logprobs": None,
        "entropies": torch.zeros(1),
    }  # fmt: skip


def padded_tokens(spread: float = 0.3) -> PolicyTokens:
    """B completions of T tokens, one advantage each; π, π_prox and μ all differ."""
    generator = torch.Generator().manual_seed(0)
    shape = len(LENGTHS), max(LENGTHS)
    behavior = -2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    drift = spread * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    mask = (torch.arange(shape[1])[None] < torch.tensor(LENGTHS)[:, None]).double()
    advantages = torch.tensor([1.2, -0.7, 3.0, -1.5, 0.4], dtype=torch.float64)
    rows = torch.arange(shape[0])[:, None].expand(shape)
    return PolicyTokens(
        behavior + drift[0] + drift[1], behavior, advantages[:, None].expand(shape), mask, rows, behavior + drift[1]
    )


def ours(objective: PolicyObjective, tokens: PolicyTokens, kind: Aggregation, **extra: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of the step, and its gradient by log π."""
    logprobs = tokens.logprobs.clone().requires_grad_()
    weights = sample_weights(
        LENGTHS, kind, num_trajectories=len(LENGTHS), max_new_tokens=MAX_NEW_TOKENS, step_tokens=sum(LENGTHS)
    )
    loss = objective(replace(tokens, logprobs=logprobs), **extra).loss
    total = (torch.tensor(weights, dtype=torch.float64)[:, None] * loss).sum()
    return total.detach(), torch.autograd.grad(total, logprobs)[0]


def theirs(
    trl: Trl,
    tokens: PolicyTokens,
    *,
    old: Tensor | None = None,
    inputs: dict[str, Tensor] | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """The same from TRL, whose `old_per_token_logps` are μ unless given."""
    logprobs = tokens.logprobs.clone().requires_grad_()
    trainer = trl(logprobs=logprobs, entropies=settings.pop("entropies", torch.zeros_like(logprobs)), **settings)
    ids = torch.ones_like(tokens.mask).long()
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
            "completion_mask": tokens.mask.long(), "advantages": tokens.advantages[:, 0],
            "old_per_token_logps": tokens.behavior_logprobs if old is None else old,
            "num_items_in_batch": tokens.mask.sum(), **(inputs or {}),
        },
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def assert_agree(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert second[1].abs().max() > 0.01
    for mine, other in zip(first, second, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def arguments(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**(vars(_defaults()["args"]) | changed))


# ------------------------------------------------------------------ aggregations and losses

AGGREGATIONS: list[tuple[str, Aggregation]] = [
    ("grpo", "sequence_mean"), ("dr_grpo", "constant"), ("dapo", "token_mean"), ("bnpo", "token_mean"),
]  # fmt: skip


@pytest.mark.parametrize(("loss_type", "kind"), AGGREGATIONS)
def test_the_aggregations_are_those_of_trl_with_clip_higher(trl: Trl, loss_type: str, kind: Aggregation) -> None:
    tokens = padded_tokens()
    assert_agree(ours(PolicyObjective(PPO), tokens, kind), theirs(trl, tokens, loss_type=loss_type))


def test_the_clipped_fraction_is_that_of_trl(trl: Trl) -> None:
    tokens = padded_tokens()
    trainer_metrics: dict[str, Any] = {"train": defaultdict(list)}
    theirs(trl, tokens, _metrics=trainer_metrics)
    clipped = PolicyObjective(PPO)(tokens).diagnostics["clipped"].sum() / tokens.mask.sum()
    assert trainer_metrics["train"]["clip_ratio/region_mean"] == [pytest.approx(clipped.item(), rel=1e-6)]
    assert 0.1 < clipped < 0.9


def test_dual_clip_is_the_two_sided_clipping_of_trl(trl: Trl) -> None:
    tokens = padded_tokens(spread=0.6)
    loss = PpoClipLoss(kind="ppo_clip", epsilon_low=0.1, epsilon_high=0.28, dual_clip=1.5)
    bounded = theirs(trl, tokens, args=arguments(delta=1.5))
    assert_agree(ours(PolicyObjective(loss), tokens, "sequence_mean"), bounded)
    assert bounded[0] < theirs(trl, tokens)[0]  # the bound was reached


def test_a_bound_below_the_upper_clip_holds_here_and_not_in_trl(trl: Trl) -> None:
    # TRL bounds the ratio in the first term of the minimum. Where delta is smaller than 1 + ε_high, the loss of a
    # negative advantage then is clip(ρ)·|A| by the second term, unbounded by delta, and positive advantages are stopped
    # at delta instead of 1 + ε_high. Dual-clip PPO (Ye et al.) bounds the result, and only for negative ones.
    tokens = padded_tokens()
    loss = PpoClipLoss(kind="ppo_clip", epsilon_low=0.1, epsilon_high=0.9, dual_clip=1.1)
    mine = ours(PolicyObjective(loss), tokens, "token_mean")
    other = theirs(trl, tokens, loss_type="dapo", epsilon_high=0.9, args=arguments(delta=1.1))
    ratio, number = (tokens.logprobs - tokens.behavior_logprobs).exp(), tokens.mask.sum()
    beyond = (tokens.mask > 0) & (ratio > 1.1)
    excess = (ratio.clamp(max=1.9) - 1.1) * tokens.advantages.abs() * beyond
    torch.testing.assert_close(other[0] - mine[0], excess.sum() / number)
    between = beyond & (ratio < 1.9)
    assert {-1.0, 1.0} == set(tokens.advantages[between].sign().tolist())
    torch.testing.assert_close(other[1] - mine[1], ratio * tokens.advantages.abs() * between / number)


@pytest.mark.parametrize(("loss_type", "kind"), AGGREGATIONS)
def test_gspo_is_that_of_trl_in_every_aggregation(trl: Trl, loss_type: str, kind: Aggregation) -> None:
    # TRL differentiates the mean itself, here each token carries its own gradient: the sum over a completion is equal.
    tokens = padded_tokens()
    loss = GspoLoss(kind="gspo", epsilon_low=0.1, epsilon_high=0.2)
    settings = {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.2}
    assert_agree(ours(PolicyObjective(loss), tokens, kind), theirs(trl, tokens, loss_type=loss_type, **settings))


def test_cispo_is_that_of_trl_whose_bound_is_the_weight_itself(trl: Trl) -> None:
    # Our epsilon_high is MiniMax's: the weight is clipped at 1 + epsilon_high, TRL's at epsilon_high.
    tokens = padded_tokens(spread=0.6)
    loss = CispoLoss(kind="cispo", epsilon_high=0.3)
    assert_agree(
        ours(PolicyObjective(loss), tokens, "token_mean"), theirs(trl, tokens, loss_type="cispo", epsilon_high=1.3)
    )


def test_sapo_is_that_of_trl(trl: Trl) -> None:
    tokens = padded_tokens()
    assert_agree(ours(PolicyObjective(SAPO), tokens, "sequence_mean"), theirs(trl, tokens, loss_type="sapo"))


def test_the_default_gates_of_sapo_are_those_of_trl(trl: Trl) -> None:
    from trl import GRPOConfig

    defaults = SapoLoss(kind="sapo")
    assert (defaults.tau_positive, defaults.tau_negative) == (
        GRPOConfig.sapo_temperature_pos,
        GRPOConfig.sapo_temperature_neg,
    )


# ------------------------------------------------------------------ regularisers


def test_the_penalty_k3_is_that_of_trl(trl: Trl) -> None:
    tokens = padded_tokens()
    reference = tokens.logprobs - 0.3 * tokens.behavior_logprobs.sin()
    objective = PolicyObjective(PPO, None, KlConfig(weight=0.2, estimator="k3"))
    assert_agree(
        ours(objective, tokens, "sequence_mean", reference_logprobs=reference),
        theirs(trl, tokens, beta=0.2, inputs={"ref_per_token_logps": reference}),
    )


def test_the_entropy_bonus_is_that_of_trl_where_tokens_are_averaged(trl: Trl) -> None:
    # TRL's bonus is a mean over tokens whatever the loss; ours is aggregated as the loss is, so that one rule holds for
    # every term: in sequence_mean it is the mean over completions.
    tokens = padded_tokens()
    entropies = tokens.behavior_logprobs.abs()
    objective = PolicyObjective(PPO, None, None, 0.3)
    settings = {"entropies": entropies, "_entropy_bonus_enabled": True, "entropy_coef": 0.3}
    settings["accelerator"] = SimpleNamespace(**vars(_defaults()["accelerator"]), sync_gradients=False)
    assert_agree(
        ours(objective, tokens, "token_mean", entropies=entropies), theirs(trl, tokens, loss_type="bnpo", **settings)
    )
    mine, other = ours(objective, tokens, "sequence_mean", entropies=entropies), theirs(trl, tokens, **settings)
    sums, counts = (entropies * tokens.mask).sum(1), tokens.mask.sum(1)
    difference = 0.3 * (sums.sum() / counts.sum() - (sums / counts.clamp(min=1)).mean())
    torch.testing.assert_close(mine[0] - other[0], difference)


# ------------------------------------------------------------------ importance weights


def importance_ratio(trl: Trl, tokens: PolicyTokens, mode: str, low: float | None, high: float | None) -> Tensor:
    """TRL's weight for the difference between vLLM and the trainer, which computed `old_per_token_logps`."""
    counting = [place for place, length in enumerate(LENGTHS) if length]  # TRL generates no empty completion
    lengths = [LENGTHS[place] for place in counting]
    trainer = trl(
        logprobs=tokens.proximal[counting], lengths=lengths, rewards=[0.0] * 4, use_vllm=True,
        sampling_logprobs=[tokens.behavior_logprobs[place, : LENGTHS[place]].tolist() for place in counting],
        vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # TRL makes a tensor of Python floats
    try:
        output = trainer._generate_and_score_completions([{"prompt": "p"}] * len(counting))
    finally:
        torch.set_default_dtype(default)
    weights = torch.zeros_like(tokens.mask)
    weights[counting] = output["importance_sampling_ratio"].expand(len(counting), weights.shape[1])
    return weights * tokens.mask


def test_the_weights_are_those_of_trl(trl: Trl) -> None:
    tokens = padded_tokens()
    for mode, low, high, weights in (
        ("token_truncate", None, 1.2, tis(tokens, cap=1.2)),
        ("sequence_truncate", None, 1.5, tis(tokens, cap=1.5, level="sequence")),
        ("token_mask", 0.8, 1.3, icepop(tokens, low=0.8, high=1.3)),
    ):
        torch.testing.assert_close(weights, importance_ratio(trl, tokens, mode, low, high), msg=mode)
        assert len(weights.unique()) > 3


def test_sequence_masks_differ_from_those_of_trl_in_the_mean_and_in_the_weight(trl: Trl) -> None:
    # TRL looks at the product of the ratios, which leaves any interval as completions grow longer, and multiplies with
    # it; we look at the geometric mean and mask only. For completions of one token the same ones are kept.
    tokens = padded_tokens()
    product = importance_ratio(trl, tokens, "sequence_mask", 0.9, 1.1)
    single = torch.tensor(LENGTHS) == 1
    log_weight = (tokens.proximal - tokens.behavior_logprobs) * tokens.mask
    geometric = (log_weight.sum(1) / tokens.mask.sum(1).clamp(min=1)).exp()
    for low, high in ((0.9, 1.1), (0.5, 2.0)):
        theirs_kept = importance_ratio(trl, tokens, "sequence_mask", low, high) > 0
        kept = sequence_mask(tokens, low=low, high=high)
        assert (theirs_kept[single] == (kept[single] > 0)).all()
        assert kept[:, 0].tolist() == [float(length > 0 and low <= mean <= high)
                                       for length, mean in zip(LENGTHS, geometric.tolist(), strict=True)]  # fmt: skip
    assert set(product.unique().tolist()) <= {0.0, *log_weight.sum(1).exp().tolist()}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo"])
def test_a_weighed_loss_is_that_of_trl_with_vllm(trl: Trl, loss_type: str) -> None:
    # TRL too takes the loss's ratio to the policy at the start of the update, and multiplies with π_prox/μ.
    tokens = padded_tokens()
    ratio = importance_ratio(trl, tokens, "token_truncate", None, 1.2)
    loss = {
        "grpo": PPO,
        "dapo": PPO,
        "cispo": CispoLoss(kind="cispo", epsilon_high=0.28),
        "sapo": SAPO,
    }
    kind: Aggregation = "sequence_mean" if loss_type in ("grpo", "sapo") else "token_mean"
    objective = PolicyObjective(loss[loss_type], TruncatedCorrection(kind="tis", cap=1.2))
    assert_agree(
        ours(objective, tokens, kind),
        theirs(
            trl, tokens, old=tokens.proximal, inputs={"importance_sampling_ratio": ratio}, loss_type=loss_type,
            epsilon_high=1.28 if loss_type == "cispo" else 0.28, use_vllm=True,
            vllm_importance_sampling_correction=True,
        ),
    )  # fmt: skip


def test_with_one_step_per_batch_icepop_weighs_reinforce_as_trl_weighs_grpo(trl: Trl) -> None:
    # old = current: GRPO's ratio is 1, and its gradient that of REINFORCE.
    tokens = replace(padded_tokens(), proximal_logprobs=None)
    ratio = importance_ratio(trl, tokens, "token_mask", 0.8, 1.3)
    reinforced = PolicyObjective(ReinforceLoss(kind="reinforce"), IcePopCorrection(kind="icepop", low=0.8, high=1.3))
    _, other = theirs(
        trl, tokens, old=tokens.logprobs, inputs={"importance_sampling_ratio": ratio}, use_vllm=True,
        vllm_importance_sampling_correction=True,
    )  # fmt: skip
    torch.testing.assert_close(ours(reinforced, tokens, "sequence_mean")[1], other)


# ------------------------------------------------------------------ advantages

REWARDS = [[1.0, 0.0, 0.25, 0.5], [0.0, 0.0, 1.0, 0.0]]


def trl_advantages(trl: Trl, rewards: Sequence[Sequence[float]], scale_rewards: str) -> np.ndarray[Any, Any]:
    flat = [reward for of_group in rewards for reward in of_group]
    trainer = trl(lengths=[1] * len(flat), rewards=flat, scale_rewards=scale_rewards, logprobs=torch.zeros(1))
    output = trainer._generate_and_score_completions([{"prompt": "p"}] * len(flat))
    return output["advantages"].numpy().reshape(len(rewards), -1)


def test_unscaled_advantages_are_those_of_trl(trl: Trl) -> None:
    mine = [group_mean(np.array(of_group)) for of_group in REWARDS]
    np.testing.assert_allclose(mine, trl_advantages(trl, REWARDS, "none"), atol=1e-6)


def test_scaled_advantages_are_those_of_trl_up_to_the_kind_of_deviation(trl: Trl) -> None:
    # TRL divides by the sample deviation (G - 1 in its denominator) plus 1e-4, DeepSeekMath's formula names "std" only;
    # here it is the population's plus 1e-6.
    for of_group, other in zip(REWARDS, trl_advantages(trl, REWARDS, "group"), strict=True):
        rewards = np.array(of_group)
        rescaled = group_normalized(rewards) * (rewards.std() + 1e-6) / (rewards.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(rescaled, other, rtol=1e-5)
        np.testing.assert_allclose(group_normalized(rewards), other * math.sqrt(4 / 3), rtol=1e-3)


def test_batch_scaling_of_trl_divides_by_the_deviation_of_rewards_and_not_of_centred_ones(trl: Trl) -> None:
    # REINFORCE++ with baseline normalises what is left after the group's mean is taken off; TRL's "batch" divides the
    # same numerators by the deviation of the rewards themselves, in which differences between problems count.
    rewards = [np.array(of_group) for of_group in REWARDS]
    mine, other = np.array(reinforce_plus_plus(rewards)), trl_advantages(trl, REWARDS, "batch")
    centred = np.concatenate([group_mean(of_group) for of_group in rewards])
    factor = (centred.std() + 1e-6) / (np.concatenate(rewards).std(ddof=1) + 1e-4)
    np.testing.assert_allclose(mine * factor, other, rtol=1e-5)


def test_a_failed_score_is_out_of_the_baseline_in_both_and_has_no_advantage_here(trl: Trl) -> None:
    rewards = [[1.0, math.nan, 0.0, 0.5]]
    other, mine = trl_advantages(trl, rewards, "none")[0], group_mean(np.array(rewards[0]))
    np.testing.assert_allclose(mine[[0, 2, 3]], other[[0, 2, 3]], atol=1e-6)
    # TRL trains on it with advantage 0, which still counts in the number of tokens; here it becomes no sample.
    assert other[1] == 0
    assert np.isnan(mine[1])
