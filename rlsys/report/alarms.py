"""The alarms of a run: rules over the metrics of a GRPO step that say what is going wrong and what to do.

Stands after the metrics of a step are known, beside the files and dashboards that show them; it only speaks, and never
stops a run.

Invariant: a rule rings once when it has been broken for its number of steps in a row, and again only after it was kept
for `CALM_STEPS` in a row in between. A step without the metric changes nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from rlsys.config import Config

CALM_STEPS = 10
"""Steps in a row for which a rule must be kept before it can ring again."""
FIRST_STEPS = 10
"""Steps whose mean entropy is what later entropies are compared with."""
BIAS_ERRORS = 2.0
"""Standard errors that are taken off the length bias: noise alone does not ring."""


class Alarm(NamedTuple):
    """One alarm at one step."""

    name: str
    """The metric that it is about."""
    message: str
    """Value, condition, meaning and advice."""


class Direction(StrEnum):
    """On which side of its threshold a value breaks a rule."""

    ABOVE = "above"
    BELOW = "below"


@dataclass(frozen=True)
class Rule:
    """What is not to happen. A value that is not a number breaks every rule."""

    metric: str
    direction: Direction
    threshold: float
    steps: int
    """How many steps in a row break the rule before it rings."""
    meaning: str
    """What it means, and what to do: one or two sentences."""
    condition: str = ""
    """How people read direction and threshold, where these words don't do."""

    def is_broken(self, value: float) -> bool:
        """Whether `value` lies beyond the threshold."""
        return not (value <= self.threshold if self.direction is Direction.ABOVE else value >= self.threshold)

    def message(self, value: float) -> str:
        """The sentences for a metric of `value`."""
        condition = self.condition or f"{self.direction} {self.threshold:g}"
        often = f" for {self.steps} steps" if self.steps > 1 else ""
        return f"{self.metric} is {value:.3g}, {condition}{often}. {self.meaning}"


@dataclass
class _Watch:
    """How a rule stands."""

    broken_in_a_row: int = 0
    kept_in_a_row: int = 0
    is_ringing: bool = False

    def note(self, is_broken: bool, steps: int) -> bool:
        """Count a step; whether the rule rings at it."""
        self.broken_in_a_row = self.broken_in_a_row + 1 if is_broken else 0
        self.kept_in_a_row = 0 if is_broken else self.kept_in_a_row + 1
        if self.kept_in_a_row >= CALM_STEPS:
            self.is_ringing = False
        rings = not self.is_ringing and self.broken_in_a_row >= steps
        self.is_ringing = self.is_ringing or rings
        return rings


@dataclass
class Alarms:
    """The rules of one run and how they stand."""

    config: Config
    rung: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """For the summary: the steps at which each alarm rang, by its name; no entry for one that never did."""

    def __post_init__(self) -> None:
        self._rules = rules_for(self.config)
        self._watches = {rule.metric: _Watch() for rule in self._rules}
        self._first_entropies: list[float] = []

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Return what rings at `step`; to be called once for each GRPO step, in order."""
        values = self._watched_values(metrics)
        alarms = [
            Alarm(rule.metric, rule.message(metrics[rule.metric]))
            for rule in self._rules
            if rule.metric in values
            and self._watches[rule.metric].note(rule.is_broken(values[rule.metric]), rule.steps)
        ]
        for alarm in alarms:
            self.rung.setdefault(alarm.name, []).append(step)
        return alarms

    def state(self) -> dict[str, Any]:
        """Return everything as JSON-able data, for a checkpoint."""
        return {
            "rung": {name: list(steps) for name, steps in self.rung.items()},
            "watches": {name: vars(watch).copy() for name, watch in self._watches.items()},
            "first_entropies": list(self._first_entropies),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.rung = {name: list(steps) for name, steps in state["rung"].items()}
        # A state of an older rlsys knows fewer rules.
        self._watches |= {name: _Watch(**watch) for name, watch in state["watches"].items()}
        self._first_entropies = list(state["first_entropies"])

    def _watched_values(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What the rules compare: the metrics, but two of them in relation to something."""
        values = dict(metrics)
        if "length/bias" in metrics:
            noise = BIAS_ERRORS * metrics["length/bias_error"]
            values["length/bias"] = abs(metrics["length/bias"]) - noise
        entropy = values.pop("train/entropy", None)
        if entropy is not None and len(self._first_entropies) == FIRST_STEPS:
            values["train/entropy"] = entropy * FIRST_STEPS / max(sum(self._first_entropies), sys.float_info.min)
        elif entropy is not None and math.isfinite(entropy):
            self._first_entropies.append(entropy)
        return values


def rules_for(config: Config) -> tuple[Rule, ...]:
    """The rules for a run of `config`."""
    return (*_learning_rules(config), *_data_rules(config))


def _learning_rules(config: Config) -> tuple[Rule, ...]:
    """About the learner's step and its distance to the rollout workers."""
    return (
        Rule(
            "train/mismatch_abs_mean",
            Direction.ABOVE,
            {"fp32": 1e-3, "bf16": 3e-2}[config.learner.precision],
            2,
            "Engine and learner give the same tokens other probabilities at the same weights, so every ratio is wrong. "
            "Look for weights that are not loaded, and for another precision or temperature on one side.",
        ),
        Rule(
            "train/ess_fraction",
            Direction.BELOW,
            0.3,
            3,
            "The trained policy is far from the one that sampled: few tokens carry the gradient. "
            "Lower grpo.max_staleness or grpo.learning_rate.",
        ),
        Rule(
            "train/ratio_clipped_fraction",
            Direction.ABOVE,
            0.5,
            3,
            "The loss's bounds act on most tokens, so most of what is generated teaches little or nothing. "
            "Lower grpo.max_staleness or grpo.learning_rate, or widen the bounds in grpo.loss.",
        ),
        Rule(
            "train/ratio_masked_fraction",
            Direction.ABOVE,
            0.5,
            3,
            "The correction leaves most tokens out, so most of what is generated teaches nothing. "
            "Lower grpo.max_staleness or grpo.learning_rate, or widen the interval in grpo.correction.",
        ),
        Rule(
            "train/step_skipped",
            Direction.ABOVE,
            0.0,
            1,
            "DeepSpeed skipped the step because its gradient was not finite: the weights did not change, though the "
            "version went on. If it happens again, lower grpo.learning_rate, and see rollout/non_finite_fraction.",
        ),
        Rule(
            "train/entropy",
            Direction.BELOW,
            0.1,
            5,
            "The policy nearly always writes the same, and explores no more. Unless its reward is as good as it gets: "
            "raise grpo.entropy_weight, or the upper bound of the loss (epsilon_high), or lower grpo.learning_rate.",
            condition=f"below a tenth of the mean of the first {FIRST_STEPS} steps",
        ),
    )


def _data_rules(config: Config) -> tuple[Rule, ...]:
    """About what the rollouts bring."""
    bias = config.grpo.length_bias_alarm
    return (
        Rule(
            "length/bias",
            Direction.ABOVE,
            bias,
            5,
            "Trained completions are not as long as those that are generated: what is dropped on the way prefers one "
            "length, and so will the policy. See group/filtered and group/failed.",
            condition=f"away from 0 by more than {bias:g} beyond its noise ({BIAS_ERRORS:g} standard errors)",
        ),
        Rule(
            "reward/failed_fraction",
            Direction.ABOVE,
            min(0.05, config.scoring.max_failed_fraction / 2),
            3,
            "Rewards fail or time out, and their completions teach nothing; "
            f"the run stops at {config.scoring.max_failed_fraction:g}. "
            "Raise timeout_seconds of the slow reward or scoring.scorers, or mend the reward that fails.",
        ),
        Rule(
            "rollout/non_finite_fraction",
            Direction.ABOVE,
            0.0,
            1,
            "The engine gave completions log-probabilities that are not finite (nan, inf); they are left out of "
            "training. Look at the weights that it holds, its precision, and rollout.temperature.",
        ),
        Rule(
            "rollout/truncated_fraction",
            Direction.ABOVE,
            0.5,
            5,
            "Most completions are cut before they answer. Raise rollout.max_new_tokens, or see grpo.over_long.",
        ),
        Rule(
            "group/constant_reward_fraction",
            Direction.ABOVE,
            0.95,
            5,
            "Nearly all groups have equal rewards and teach nothing: the problems are too hard or too easy. "
            "Train the warm start longer, raise grpo.group_size, or set grpo.curriculum.",
        ),
    )
