"""The sections of `grpo`: which groups are trained, what their advantages are, and what the loss makes of them.

Each `kind` names one small function: advantages in `rlsys.algorithms.advantages`, losses in `rlsys.algorithms.losses`
(`gspo` in `sequence_losses`, `m2po` in `second_moment` beside it), corrections in `rlsys.algorithms.corrections`,
orders in `rlsys.pipeline.staleness`. The formulas and their sources are in the docstrings there; `rlsys config
grpo.loss` and the like print what is here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlsys.config_section import Float, Fraction, Int, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

# ---------------------------------------------------------------- advantages


class GroupMeanAdvantage(Section):
    """Reward minus the group's mean (Dr. GRPO)."""

    kind: Literal["group_mean"] = "group_mean"


class GroupNormalizedAdvantage(Section):
    """Reward minus the group's mean, in units of the group's standard deviation (GRPO)."""

    kind: Literal["group_normalized"]


class RlooAdvantage(Section):
    """Reward minus the mean of the group's other rewards (RLOO)."""

    kind: Literal["rloo"]


class ReinforcePlusPlusAdvantage(Section):
    """Reward minus the group's mean, in units of the whole step's standard deviation (REINFORCE++ with baseline)."""

    kind: Literal["reinforce_plus_plus"]


class LengthControlledAdvantage(Section):
    """Leave-one-out on rewards that a longer completion lowers, within the group's successes."""

    kind: Literal["length_controlled"]
    alpha: Annotated[Float, Field(ge=0, lt=1)] = 0.1
    """Strength: a success of the greatest length loses up to this share of its reward."""


class PassAtKAdvantage(Section):
    """Gradient of the best of k completions instead of that of one (pass@k, max@k)."""

    kind: Literal["pass_at_k"]
    k: Annotated[Int, Field(ge=2)] = 4
    """How many completions a problem is allowed; at most grpo.group_size - 1."""


Advantage = Annotated[
    GroupMeanAdvantage
    | GroupNormalizedAdvantage
    | RlooAdvantage
    | ReinforcePlusPlusAdvantage
    | LengthControlledAdvantage
    | PassAtKAdvantage,
    Field(discriminator="kind"),
]


# ---------------------------------------------------------------- losses


class DppoLoss(Section):
    """DPPO: policy gradient on the ratio to the behavior policy, masked where the total variation leaves a box."""

    kind: Literal["dppo"]
    delta: Annotated[Float, Field(gt=0, le=1)] = 0.2
    """A token is masked where its probability already moved by more than this in the advantage's direction."""
    tau: NonNegativeFloat = 1e-3
    """Weight of the squared log-ratio, which keeps the policy near the behavior policy."""


class ReinforceLoss(Section):
    """REINFORCE on the sampled tokens, without any correction for staleness."""

    kind: Literal["reinforce"]


class PpoClipLoss(Section):
    """PPO's clipped surrogate on the ratio to the behavior policy; the loss of GRPO, Dr. GRPO and DAPO."""

    kind: Literal["ppo_clip"]
    epsilon_low: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    """The ratio is clipped below 1 - epsilon_low."""
    epsilon_high: PositiveFloat = 0.2
    """The ratio is clipped above 1 + epsilon_high; larger than epsilon_low is clip-higher (DAPO)."""
    dual_clip: Annotated[Float, Field(gt=1)] | None = None
    """Bound on the loss of a token of negative advantage, in units of the advantage (dual-clip PPO, 3 there)."""


class DecoupledPpoLoss(Section):
    """Decoupled PPO: the trust region is around the proximal policy, the behavior policy enters as a capped weight. A
    batch makes one optimizer step here, so the proximal policy is the current one and only the weight acts.
    """

    kind: Literal["decoupled_ppo"]
    epsilon_low: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    """The ratio to the proximal policy is clipped below 1 - epsilon_low."""
    epsilon_high: PositiveFloat = 0.2
    """The ratio to the proximal policy is clipped above 1 + epsilon_high."""
    weight_cap: Annotated[Float, Field(ge=1)] = 5.0
    """Greatest weight (proximal / behavior probability) of a token."""


class GspoLoss(Section):
    """GSPO: one ratio per completion, the geometric mean of its tokens', clipped."""

    kind: Literal["gspo"]
    epsilon_low: Annotated[Float, Field(gt=0, lt=1)] = 3e-4
    """The completion's ratio is clipped below 1 - epsilon_low."""
    epsilon_high: PositiveFloat = 4e-4
    """The completion's ratio is clipped above 1 + epsilon_high."""


class CispoLoss(Section):
    """CISPO: every token keeps its gradient; only its importance weight is clipped."""

    kind: Literal["cispo"]
    epsilon_low: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """The weight is clipped below 1 - epsilon_low; 1 is no lower bound."""
    epsilon_high: PositiveFloat = 2.0
    """The weight is clipped above 1 + epsilon_high."""


class SapoLoss(Section):
    """SAPO: a smooth gate on the ratio instead of a clip."""

    kind: Literal["sapo"]
    tau_positive: PositiveFloat = 1.0
    """Sharpness of the gate where the advantage is positive."""
    tau_negative: PositiveFloat = 1.05
    """Sharpness where it is negative; larger, because such tokens destabilise more."""


class M2poLoss(Section):
    """M2PO: the tokens that moved furthest in their advantage's direction are masked until the step's second moment of
    log-ratios is small enough.
    """

    kind: Literal["m2po"]
    tau: PositiveFloat = 0.04
    """Bound on the mean squared log-ratio, over the whole step, of the kept tokens that moved in that direction."""


Loss = Annotated[
    DppoLoss | ReinforceLoss | PpoClipLoss | DecoupledPpoLoss | GspoLoss | CispoLoss | SapoLoss | M2poLoss,
    Field(discriminator="kind"),
]


# ---------------------------------------------------------------- corrections and regularisers


class TruncatedCorrection(Section):
    """TIS: multiply the loss by the importance weight, truncated at a cap. The loss's own ratio is then 1, because a
    batch makes one optimizer step, and its clip does not act.
    """

    kind: Literal["tis"]
    cap: Annotated[Float, Field(ge=1)] = 2.0
    """Greatest weight."""
    level: Literal["token", "sequence"] = "token"
    """One weight for each token, or one for the whole completion (the product of its tokens')."""


class IcePopCorrection(Section):
    """IcePop: the importance weight where it lies in an interval, 0 outside."""

    kind: Literal["icepop"]
    low: Annotated[Float, Field(gt=0, le=1)] = 0.5
    """Tokens with a smaller weight are masked."""
    high: Annotated[Float, Field(ge=1)] = 5.0
    """Tokens with a larger weight are masked."""


class SequenceMaskCorrection(Section):
    """Mask whole completions whose geometric-mean importance weight lies outside an interval."""

    kind: Literal["sequence_mask"]
    low: Annotated[Float, Field(gt=0, le=1)] = 0.99
    """Completions with a smaller mean weight are masked."""
    high: Annotated[Float, Field(ge=1)] = 1.01
    """Completions with a larger mean weight are masked."""


Correction = Annotated[TruncatedCorrection | IcePopCorrection | SequenceMaskCorrection, Field(discriminator="kind")]


class KlConfig(Section):
    """A penalty for leaving the reference policy, which is the policy at the start of GRPO (the warm start)."""

    weight: PositiveFloat
    """Its factor in the loss."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Which estimate of the divergence (Schulman 2020): k1 and k2 have the gradient of KL(policy || reference), k3 that
    of KL(reference || policy), as GRPO has it."""


# ---------------------------------------------------------------- which groups are trained


class KeepOverLong(Section):
    """Completions that hit the token limit are trained like all others."""

    kind: Literal["keep"] = "keep"


class MaskOverLong(Section):
    """Completions that hit the token limit are left out of the loss (they still count in their group's mean); a group
    of nothing else is replaced by another.
    """

    kind: Literal["mask"]


class PenaliseOverLong(Section):
    """The reward falls linearly by up to `weight` over the last tokens before the limit (DAPO's over-long penalty)."""

    kind: Literal["penalise"]
    buffer_tokens: Positive
    """Over how many tokens before rollout.max_new_tokens the penalty rises to its full size."""
    weight: PositiveFloat = 1.0
    """How much less reward a completion at the limit gets."""


OverLong = Annotated[KeepOverLong | MaskOverLong | PenaliseOverLong, Field(discriminator="kind")]


class StrictOrder(Section):
    """Bound by admission, oldest first: nothing is dropped for its age."""

    kind: Literal["strict"] = "strict"


class WindowedOrder(Section):
    """As strict, but fast groups may pass a slow one."""

    kind: Literal["windowed"]
    window: Positive
    """Greatest number of groups W that may pass any one group; the buffer has W slots fewer."""


class EvictOrder(Section):
    """Bound on the average by admission, and groups found too old are dropped (what most systems do; to compare)."""

    kind: Literal["evict"]


Order = Annotated[StrictOrder | WindowedOrder | EvictOrder, Field(discriminator="kind")]


class CurriculumConfig(Section):
    """Problems are drawn by their measured pass rate: those sometimes solved more often, none never."""

    floor: Annotated[Float, Field(gt=0, le=1)] = 0.1
    """Weight of a problem that is always or never solved; one that is solved half of the time has weight 1."""
    memory: Annotated[Float, Field(ge=0, lt=1)] = 0.5
    """How much of the old pass rate stays when a problem is measured again."""


class GrpoConfig(Section):
    """Asynchronous GRPO."""

    steps: Positive
    """Optimizer steps."""
    groups_per_step: Positive = 32
    """Groups P in a step."""
    group_size: Annotated[Int, Field(ge=2)] = 8
    """Completions G of each problem."""
    max_staleness: NonNegative = 1
    """Exact bound S: steps between a completion's first token and its use. 0 is synchronous training."""
    order: Order = StrictOrder()
    """How the bound is kept, and in which order groups are trained."""
    streaming: bool = False
    """Start the learner on a step's first groups while the last are still being generated. Exact, so it needs an
    aggregation and an advantage that do not look at the whole step."""
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate."""
    warmup_steps: NonNegative = 0
    """Steps of linear rise to the peak; constant after it."""
    advantage: Advantage = GroupMeanAdvantage()
    """How much better a trajectory is than its group."""
    loss: Loss = DppoLoss(kind="dppo")
    """The policy loss."""
    correction: Correction | None = None
    """A further weight or mask for the difference between the sampling policy and the one that is trained."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """How token losses add up to the step's: mean over its tokens (DAPO), mean over completions of their means
    (GRPO), or sum over completions / (their number x rollout.max_new_tokens) (Dr. GRPO)."""
    kl: KlConfig | None = None
    """Penalty for leaving the warm start; null for none."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    filter_zero_variance: bool = True
    """Leave out groups whose rewards are all equal (they teach nothing) and generate others instead."""
    over_long: OverLong = KeepOverLong()
    """What becomes of completions that hit the token limit."""
    curriculum: CurriculumConfig | None = None
    """Draw problems by measured pass rate; null visits all in turn."""
    length_bias_alarm: Fraction = 0.2
    """Warn when trained completions are longer or shorter than generated ones by more than this share."""
