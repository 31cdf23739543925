"""The numbers that a run reports: a closed list of names, each with the reduction that makes a step's values one.

A fact is recorded where it is known; the controller flushes once per step, to `metrics.jsonl`, to W&B and to Ray's
metrics. Dashboards and the report read these names, so they are an interface: `area/quantity[_unit]`, areas train,
off_policy, reward, group, staleness, rollout, length, evaluation, embed, time, throughput, tokens. Only `reward/<part>`
is open, because users name their reward parts.

Invariant: nothing is reported under a name that is not listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from rlsys.pipeline.waits import WAITS, Role


class Reduction(StrEnum):
    """How the values of one step become one."""

    MEAN = "mean"
    SUM = "sum"
    MAX = "max"
    LAST = "last"


@dataclass(frozen=True)
class MetricSpec:
    """What a name stands for."""

    reduction: Reduction
    description: str


def _mean(description: str) -> MetricSpec:
    return MetricSpec(Reduction.MEAN, description)


def _sum(description: str) -> MetricSpec:
    return MetricSpec(Reduction.SUM, description)


def _max(description: str) -> MetricSpec:
    return MetricSpec(Reduction.MAX, description)


def _last(description: str) -> MetricSpec:
    return MetricSpec(Reduction.LAST, description)


def _role_times() -> dict[str, MetricSpec]:
    specs: dict[str, MetricSpec] = {}
    for role in Role:
        for part in ("busy", *WAITS[role], "idle"):
            specs[f"time/{role}_{part}_fraction"] = _last(f"part of the {role}'s time in this step: {part}")
    return specs


MAX_STALENESS = 8
"""Tokens of this staleness or more are counted together."""


def _off_policy() -> dict[str, MetricSpec]:
    specs: dict[str, MetricSpec] = {}
    for staleness in range(MAX_STALENESS + 1):
        tokens = f"tokens of staleness {staleness}{' or more' if staleness == MAX_STALENESS else ''}"
        specs |= {
            f"off_policy/{quantity}_staleness_{staleness}": _last(f"{description}, {tokens}")
            for quantity, description in {
                "logprob_abs_mean": "mean |log-probability difference|",
                "logprob_abs_max": "greatest |log-probability difference|",
                "kl": "KL(sampling policy || current policy), k3",
                "ratio_mean": "mean ratio of current to sampling probability",
                "ess": "effective sample size of the ratios / tokens",
                "clipped_fraction": "part at which the loss's bound acts",
                "masked_fraction": "part that the correction leaves out",
            }.items()
        }
    return specs


OPEN_PREFIX = "reward/"
"""Names below it are open: the mean of a reward part over the trajectories in which it could be computed."""

METRICS: Mapping[str, MetricSpec] = MappingProxyType(
    {
        "train/loss": _last("loss of the step: sum over its tokens of loss x weight (grpo.aggregation)"),
        "train/entropy": _last("mean entropy of the policy at the loss tokens, nats"),
        "train/reference_kl": _last("KL of the current to the reference policy (the warm start), loss tokens"),
        "train/gradient_norm": _last("norm of the gradient before clipping"),
        "train/step_skipped": _last("1 where DeepSpeed left out the step because its gradient was not finite, else 0"),
        "train/learning_rate": _last("learning rate of the step"),
        "train/prompt_sharing": _last("tokens of samples with a prompt each / tokens that the learner ran"),
        "train/ratio_mean": _last("mean ratio of current to sampling probability, all loss tokens"),
        "train/ratio_masked_fraction": _last("part of the loss tokens that the correction leaves out"),
        "train/ratio_clipped_fraction": _last(
            "part of the loss tokens at which the loss's bound acts: no policy gradient, or a clipped weight (cispo)"
        ),
        "train/ess_fraction": _last("effective sample size of the ratios / loss tokens"),
        "train/behavior_kl": _last("KL(sampling policy || current policy), k3, all loss tokens"),
        "train/logprob_abs_mean": _last("mean |log-probability difference|, all loss tokens"),
        "train/logprob_abs_max": _last("greatest |log-probability difference|, all loss tokens"),
        "train/mismatch_tokens": _last("tokens that the learner's own version sampled, in the loss or only probed"),
        "train/mismatch_kl": _last("KL(engine || learner) at equal version, k3"),
        "train/mismatch_abs_mean": _last("mean |log-probability difference| at equal version"),
        "train/mismatch_abs_max": _last("greatest |log-probability difference| at equal version"),
        "reward/total": _mean("combined reward of valid trajectories"),
        "reward/failed_fraction": _mean("part of the trajectories with a reward part that failed or timed out"),
        "group/constant_reward_fraction": _mean(
            "part of the finished groups that teach nothing: rewards equal as training sees them, or all masked"
        ),
        "group/admitted": _last("groups admitted since the run began"),
        "group/in_flight": _last("groups admitted and not ended"),
        "group/trained": _last("groups trained since the run began"),
        "group/filtered": _last("groups dropped because they have nothing to teach, since the run began"),
        "group/failed": _last("groups dropped because a role failed, since the run began"),
        "group/stale": _last("groups dropped because they were too old to be trained, since the run began"),
        "group/cancelled": _last("groups given up by the run, since it began"),
        "group/buffer_depth": _last("finished groups that wait for the learner"),
        "staleness/mean": _mean("learner's version when used - version of the first token, groups of the step"),
        "staleness/max": _max("greatest staleness of the step's groups; at most the bound"),
        "staleness/in_flight_mean": _mean("versions that went live while a group was being generated"),
        "staleness/in_queue_mean": _mean("versions made between a group's last token and its use"),
        "rollout/completion_tokens": _mean("tokens of a completion"),
        "rollout/completion_tokens_max": _max("tokens of the longest completion"),
        "rollout/truncated_fraction": _mean("part of the completions cut at the token limit"),
        "rollout/non_finite_fraction": _mean(
            "part of the completions with a log-probability that is not finite: left out of training"
        ),
        "rollout/spanning_fraction": _mean("part of the completions that more than one version wrote"),
        "rollout/prefix_cache_hit_fraction": _last(
            "prompt tokens found in the engines' prefix caches, since they started"
        ),
        "rollout/preemptions": _last(
            "requests that the engines computed anew (a weight load asks for it), since they started"
        ),
        "length/generated_mean": _last("mean tokens of the completions generated lately"),
        "length/generated_p95": _last("95th percentile of their tokens"),
        "length/generated_p50": _last("median of their tokens"),
        "length/trained_p50": _last("median of the tokens of the completions trained lately"),
        "length/bias_error": _last("standard error of the bias"),
        "length/trained_mean": _last("mean tokens of the completions trained lately"),
        "length/trained_p95": _last("95th percentile of their tokens"),
        "length/bias": _last("trained mean / generated mean - 1: what filters and staleness do to lengths"),
        "evaluation/version": _last("policy version of the newest evaluation"),
        "evaluation/accuracy": _last("its exact-answer accuracy at the training temperature, validation problems"),
        "evaluation/greedy_accuracy": _last("its greedy accuracy"),
        "embed/hit_fraction": _mean("part of the sequences found in the feature cache"),
        "embed/latency_seconds": _mean("seconds until the features of a group were there"),
        "time/step_seconds": _sum("seconds of the optimizer step on the learner"),
        "time/grpo_seconds": _last("wall seconds of all GRPO steps so far"),
        "time/weight_load_seconds": _mean("seconds until new weights were live on all workers"),
        "time/publish_seconds": _mean("seconds in which the learner published its weights"),
        **_role_times(),
        **_off_policy(),
        "throughput/trained_trajectories": _sum("trajectories trained in the step"),
        "throughput/trajectories_per_second": _last("trajectories trained per second of wall time"),
        "throughput/trained_tokens_per_second": _last("loss tokens per second of wall time"),
        "tokens/generated": _last("tokens that finished groups hold, since the run began"),
        "tokens/trained": _last("tokens that counted in the loss, since the run began"),
        "tokens/masked": _last("tokens of trained groups that did not count, since the run began"),
        "tokens/filtered": _last("tokens discarded with filtered groups, since the run began"),
        "tokens/failed": _last("tokens discarded with failed groups, since the run began"),
        "tokens/stale": _last("tokens discarded with groups that were too old, since the run began"),
        "tokens/cancelled": _last("tokens discarded with cancelled groups, since the run began"),
        "tokens/in_flight": _last("tokens of finished groups that are not trained yet"),
    }
)
"""Every name that a run reports."""

_OPEN_SPEC = _mean("mean of a reward part")


def spec_of(name: str) -> MetricSpec:
    """Return what `name` stands for; AssertionError where it is not listed."""
    known = METRICS.get(name)
    if known is not None:
        return known
    assert name.startswith(OPEN_PREFIX), f"metric {name!r} is not listed in METRICS"
    return _OPEN_SPEC


class Metrics:
    """Collects the values of one step."""

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[float, float]]] = {}

    def record(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add a value; `weight` counts in means only (how many things `value` is already the mean of)."""
        spec_of(name)
        assert weight > 0, f"metric {name}: a mean over {weight} things"
        self._values.setdefault(name, []).append((value, weight))

    def update(self, values: Mapping[str, float]) -> None:
        """Record each value of a mapping."""
        for name, value in values.items():
            self.record(name, value)

    def flush(self) -> dict[str, float]:
        """Return one value for each name recorded since the last flush, in order of first record, and begin anew."""
        values, self._values = self._values, {}
        return {name: _REDUCE[spec_of(name).reduction](recorded) for name, recorded in values.items()}


def _weighted_mean(recorded: Sequence[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in recorded) / sum(weight for _, weight in recorded)


_REDUCE: Mapping[Reduction, Callable[[Sequence[tuple[float, float]]], float]] = {
    Reduction.MEAN: _weighted_mean,
    Reduction.SUM: lambda recorded: sum(value for value, _ in recorded),
    Reduction.MAX: lambda recorded: max(value for value, _ in recorded),
    Reduction.LAST: lambda recorded: recorded[-1][0],
}
