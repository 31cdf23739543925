"""The alarms: each rule rings when it should, once, and says what to do."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rlsys.config import Config
from rlsys.config_file import parse_config
from rlsys.metrics import METRICS
from rlsys.report.alarms import CALM_STEPS, FIRST_STEPS, Alarms, rules_for


def config(precision: str = "fp32", **grpo: Any) -> Config:
    return parse_config(
        {
            "name": "test",
            "task": {"kind": "variant_consequence"},
            "policy": {"kind": "tiny"},
            "encoder": {"kind": "tiny"},
            "grpo": {"steps": 1, **grpo},
            "rewards": {"answer": {"kind": "answer"}},
            "learner": {"precision": precision},
        },
        "test",
    )


FINE = {
    "train/mismatch_abs_mean": 1e-6,
    "train/ess_fraction": 0.9,
    "train/ratio_clipped_fraction": 0.1,
    "train/ratio_masked_fraction": 0.1,
    "train/step_skipped": 0.0,
    "train/entropy": 0.5,
    "length/bias": 0.01,
    "length/bias_error": 0.01,
    "reward/failed_fraction": 0.0,
    "rollout/non_finite_fraction": 0.0,
    "rollout/truncated_fraction": 0.1,
    "group/constant_reward_fraction": 0.5,
}


def steps_that_ring(alarms: Alarms, metric: str, values: list[float], first: int = 1) -> list[int]:
    """The steps at which the alarm about `metric` rings, everything else being fine."""
    rang: list[int] = []
    for step, value in enumerate(values, start=first):
        names = [alarm.name for alarm in alarms.check(step, {**FINE, metric: value})]
        assert names in ([], [metric])
        rang += [step] * len(names)
    return rang


def test_a_healthy_run_is_quiet() -> None:
    alarms = Alarms(config())
    for step in range(1, 100):
        assert alarms.check(step, FINE) == []
    assert alarms.rung == {}


@pytest.mark.parametrize(("metric", "kept", "broken", "steps"), [
    ("train/mismatch_abs_mean", 1e-3, 1.1e-3, 2),
    ("train/ess_fraction", 0.3, 0.29, 3),
    ("train/ratio_clipped_fraction", 0.5, 0.51, 3),
    ("train/ratio_masked_fraction", 0.5, 0.51, 3),
    ("train/step_skipped", 0.0, 1.0, 1),
    ("train/mismatch_abs_mean", 1e-3, math.nan, 2),
    ("train/entropy", 0.051, 0.049, 5),  # a tenth of 0.5
    ("length/bias", 0.219, 0.221, 5),  # 0.2 and twice the error of 0.01
    ("length/bias", -0.219, -0.221, 5),
    ("reward/failed_fraction", 0.05, 0.06, 3),
    ("rollout/non_finite_fraction", 0.0, 1e-3, 1),
    ("rollout/truncated_fraction", 0.5, 0.51, 5),
    ("group/constant_reward_fraction", 0.95, 0.96, 5),
])  # fmt: skip
def test_a_rule_rings_when_it_is_broken_for_its_steps_in_a_row(
    metric: str, kept: float, broken: float, steps: int
) -> None:
    alarms = Alarms(config())
    assert steps_that_ring(alarms, metric, [FINE[metric]] * FIRST_STEPS) == []
    values = [broken] * (steps - 1) + [kept] + [broken] * (steps + 2)
    # The first row is one too short; the second is complete `steps` after the kept one, which is the steps-th value.
    rang = FIRST_STEPS + 2 * steps
    assert steps_that_ring(alarms, metric, values, first=FIRST_STEPS + 1) == [rang]
    assert alarms.rung == {metric: [rang]}


def test_an_alarm_rings_again_only_after_calm() -> None:
    alarms = Alarms(config())
    metric, broken, kept = "train/step_skipped", 1.0, 0.0
    restless = [broken, *[kept] * (CALM_STEPS - 1), broken]
    assert steps_that_ring(alarms, metric, restless) == [1]
    after_calm = [*[kept] * CALM_STEPS, broken]
    assert steps_that_ring(alarms, metric, after_calm, first=20) == [20 + CALM_STEPS]
    assert alarms.rung == {metric: [1, 20 + CALM_STEPS]}


def test_bf16_is_allowed_a_larger_mismatch() -> None:
    values = [2.9e-2] * 3 + [3.1e-2] * 3
    assert steps_that_ring(Alarms(config("bf16")), "train/mismatch_abs_mean", values) == [5]


def test_a_length_bias_that_may_be_noise_does_not_ring() -> None:
    alarms = Alarms(config(length_bias_alarm=0.1))
    for step in range(1, 20):
        assert alarms.check(step, {"length/bias": -0.5, "length/bias_error": 0.21}) == []
    rang = [step for step in range(20, 40) if alarms.check(step, {"length/bias": -0.5, "length/bias_error": 0.19})]
    assert rang == [24]


def test_a_step_without_the_metric_changes_nothing() -> None:
    alarms = Alarms(config())
    low = {"train/ess_fraction": 0.1}
    rang = [bool(alarms.check(step, metrics)) for step, metrics in enumerate([low, low, {}, {}, low])]
    assert rang == [False, False, False, False, True]


def test_the_message_says_value_condition_meaning_and_what_to_do() -> None:
    alarms = Alarms(config())
    message = [alarms.check(step, {"train/ess_fraction": 0.2123})[0:1] for step in range(3)][-1][0].message
    assert message == (
        "train/ess_fraction is 0.212, below 0.3 for 3 steps. The trained policy is far from the one that sampled: "
        "few tokens carry the gradient. Lower grpo.max_staleness or grpo.learning_rate."
    )
    [alarm] = alarms.check(4, {"train/step_skipped": 1.0})
    assert alarm.message.startswith(
        "train/step_skipped is 1, above 0. DeepSpeed skipped the step because its gradient was not finite: the weights "
        "did not change, though the version went on."
    )


def test_every_rule_watches_a_metric_that_a_run_reports() -> None:
    # Lengths are reported by LengthLog.
    watched = {rule.metric for rule in rules_for(config())}
    assert watched - {"length/bias"} <= METRICS.keys()
    assert watched == FINE.keys() - {"length/bias_error"}


def test_restored_alarms_go_on_as_those_that_were_saved() -> None:
    values = [0.5] * 8 + [0.2] * 4 + [0.01] * 10 + [0.5] * CALM_STEPS + [0.01] * 10
    whole = Alarms(config())
    expected = steps_that_ring(whole, "train/entropy", values)
    assert len(expected) == 2
    for cut in range(len(values)):
        first, second = Alarms(config()), Alarms(config())
        rang = steps_that_ring(first, "train/entropy", values[:cut])
        second.restore(json.loads(json.dumps(first.state())))
        assert rang + steps_that_ring(second, "train/entropy", values[cut:], first=cut + 1) == expected
        assert second.rung == whole.rung


def test_a_rule_that_a_saved_state_does_not_know_is_watched_after_a_restore() -> None:
    whole = Alarms(config())
    steps_that_ring(whole, "train/ess_fraction", [0.1, 0.1])
    state = whole.state()
    del state["watches"]["train/ratio_masked_fraction"]
    restored = Alarms(config())
    restored.restore(state)
    assert steps_that_ring(restored, "train/ratio_masked_fraction", [0.6] * 3, first=3) == [5]
    restored.restore(state)
    assert steps_that_ring(restored, "train/ess_fraction", [0.1], first=3) == [3]
