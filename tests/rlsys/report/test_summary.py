"""The summary: the keys that others read, and the lines that people read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlsys.evaluation.accuracy import EvaluationResult, Interval
from rlsys.report.summary import (
    RunStatus,
    StalenessSummary,
    Summary,
    ThroughputSummary,
    TimeSummary,
    TokenSummary,
    render_summary,
)

RESULT = EvaluationResult(0.91234, Interval(0.89, 0.93), 0.95, Interval(0.92, 0.97), 300, 1200, 0.12, 3)
SUMMARY = Summary(
    name="quickstart",
    status=RunStatus.FINISHED,
    seed=1,
    steps=300,
    wall_seconds=372.4,
    evaluation={"before": RESULT, "after_sft": RESULT, "after_grpo": RESULT},
    tokens=TokenSummary(generated=1000, trained=900, in_flight=40, discarded={"filtered": 60, "failed": 0}),
    staleness=StalenessSummary(mean=0.75, max=1, bound=1),
    time=TimeSummary(0.1, 0.25, 0.0123, "learner waits 10 % for groups; rollout workers are the bottleneck"),
    throughput=ThroughputSummary(51.23, 4567.8, 5000.0),
    mismatch=2.94e-7,
    alarms={"length/bias": [17, 60]},
)


def test_the_summary_has_the_keys_that_others_read() -> None:
    told = json.loads(json.dumps(SUMMARY.to_dict()))
    assert {"status", "seed", "steps", "wall_seconds"} <= set(told)
    for key in ("before", "after_sft", "after_grpo"):
        assert {"accuracy", "greedy_accuracy", "n", "interval", "floor"} <= set(told["evaluation"][key])
    assert told["tokens"] == {
        "generated": 1000,
        "trained": 900,
        "in_flight": 40,
        "discarded": {"filtered": 60, "failed": 0},
    }
    assert told["staleness"] == {"mean": 0.75, "max": 1, "bound": 1}
    assert {"learner_idle_fraction", "rollout_idle_fraction", "weight_load_seconds_mean"} <= set(told["time"])
    assert told["alarms"] == {"length/bias": [17, 60]}
    assert set(told["throughput"]) == {
        "trajectories_per_second",
        "trained_tokens_per_second",
        "generated_tokens_per_second",
    }


def test_token_books_that_do_not_reconcile_are_never_told() -> None:
    with pytest.raises(AssertionError, match="1000 tokens were generated, 999 are accounted for"):
        TokenSummary(generated=1000, trained=900, in_flight=40, discarded={"filtered": 59})


def test_the_lines_for_people_say_what_happened_and_where_the_files_are() -> None:
    assert render_summary(SUMMARY, Path("runs/quickstart")).splitlines() == [
        "quickstart: finished after 300 GRPO steps in 6 min 12 s (seed 1)",
        *(
            f"{title}accuracy 0.912 [0.890, 0.930], greedy 0.950, text-only floor 0.120, 300 problems"
            for title in ("before      ", "after SFT   ", "after GRPO  ")
        ),
        "tokens      1,000 generated = 900 trained + 60 discarded (60 filtered) + 40 in flight",
        "staleness   mean 0.75, max 1, bound 1",
        "busy        learner 90%, rollout 75%; weights load in 0.012 s",
        "waits       learner waits 10 % for groups; rollout workers are the bottleneck",
        "mismatch    2.9e-07 mean |log-probability difference| of engine and learner at equal version",
        "throughput  51.2 trajectories/s, 4,568 trained tokens/s, 5,000 generated tokens/s",
        "alarm       length/bias rang at step 17, 60",
        "files       runs/quickstart",
    ]
