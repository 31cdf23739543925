"""The summary of a run: what `summary.json` holds, and the dozen lines that the terminal shows at the end.

Stands after the last step and the last evaluation, or after what ended the run early. The one invariant: every token
that was generated is trained, discarded for a named reason, or in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rlsys.evaluation.accuracy import EvaluationResult, render_evaluation


class RunStatus(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    """Ctrl-C or a signal; `--resume` continues it."""
    FAILED = "failed"
    """An error ended it; `--resume` continues it once the cause is mended."""


EVALUATIONS = {"before": "before", "after_sft": "after SFT", "after_grpo": "after GRPO"}
"""Keys of the evaluations in the summary, in the order of a run, and how people read them."""


@dataclass(frozen=True)
class TokenSummary:
    """The books of generated tokens."""

    generated: int
    trained: int
    """Counted in the learner's loss."""
    in_flight: int
    """In groups that were finished but not yet trained when the run ended."""
    discarded: Mapping[str, int]
    """By reason."""

    def __post_init__(self) -> None:
        told = self.trained + self.in_flight + sum(self.discarded.values())
        assert self.generated == told, f"{self.generated} tokens were generated, {told} are accounted for"


@dataclass(frozen=True)
class StalenessSummary:
    """Staleness of the trained groups, in optimizer steps."""

    mean: float
    max: int
    bound: int


@dataclass(frozen=True)
class TimeSummary:
    """Where the time of the GRPO phase went."""

    learner_idle_fraction: float
    """Share of the phase in which the learner waited; 1 less this is its busy fraction."""
    rollout_idle_fraction: float
    """The same for the rollout workers, on average."""
    weight_load_seconds_mean: float
    """Seconds from the pause of an engine to its going on with new weights."""
    bottleneck: str
    """One sentence: who waited longest for whom."""


@dataclass(frozen=True)
class ThroughputSummary:
    """Of the GRPO phase, per second of wall time."""

    trajectories_per_second: float
    trained_tokens_per_second: float
    generated_tokens_per_second: float


@dataclass(frozen=True)
class Summary:
    """Everything that `summary.json` holds."""

    name: str
    status: RunStatus
    seed: int
    steps: int
    """GRPO steps made."""
    wall_seconds: float
    """Of the whole run, interruptions left out."""
    evaluation: Mapping[str, EvaluationResult]
    """By the keys of `EVALUATIONS`; those that were made."""
    tokens: TokenSummary
    staleness: StalenessSummary
    time: TimeSummary
    throughput: ThroughputSummary
    mismatch: float | None
    """Mean |log-probability difference| of engine and learner at equal version; None where no such token was seen."""
    alarms: Mapping[str, Sequence[int]]
    """Steps at which each alarm rang."""

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return {
            "name": self.name,
            "status": str(self.status),
            "seed": self.seed,
            "steps": self.steps,
            "wall_seconds": self.wall_seconds,
            "evaluation": {key: result.to_dict() for key, result in self.evaluation.items()},
            "tokens": {
                "generated": self.tokens.generated,
                "trained": self.tokens.trained,
                "in_flight": self.tokens.in_flight,
                "discarded": {str(reason): count for reason, count in self.tokens.discarded.items()},
            },
            "staleness": asdict(self.staleness),
            "time": asdict(self.time),
            "throughput": asdict(self.throughput),
            "mismatch": self.mismatch,
            "alarms": {name: list(steps) for name, steps in self.alarms.items()},
        }


def render_summary(summary: Summary, path: Path) -> str:
    """The summary as lines for people; `path` is the run directory."""
    tokens, staleness, time, speed = summary.tokens, summary.staleness, summary.time, summary.throughput
    discarded = ", ".join(f"{count:,} {reason}" for reason, count in tokens.discarded.items() if count)
    lines = [
        f"{summary.name}: {summary.status} after {summary.steps} GRPO steps in {_duration(summary.wall_seconds)} "
        f"(seed {summary.seed})",
        *_evaluation_lines(summary.evaluation),
        f"tokens      {tokens.generated:,} generated = {tokens.trained:,} trained + "
        f"{sum(tokens.discarded.values()):,} discarded{f' ({discarded})' if discarded else ''} + "
        f"{tokens.in_flight:,} in flight",
        f"staleness   mean {staleness.mean:.2f}, max {staleness.max}, bound {staleness.bound}",
        f"busy        learner {1 - time.learner_idle_fraction:.0%}, rollout {1 - time.rollout_idle_fraction:.0%}; "
        f"weights load in {time.weight_load_seconds_mean:.3f} s",
        f"waits       {time.bottleneck}",
        f"mismatch    {_mismatch(summary.mismatch)}",
        f"throughput  {speed.trajectories_per_second:,.1f} trajectories/s, "
        f"{speed.trained_tokens_per_second:,.0f} trained tokens/s, "
        f"{speed.generated_tokens_per_second:,.0f} generated tokens/s",
        *(f"alarm       {name} rang at step {', '.join(map(str, steps))}" for name, steps in summary.alarms.items()),
        f"files       {path}",
    ]
    return "\n".join(lines)


def _mismatch(mismatch: float | None) -> str:
    if mismatch is None:
        return "no token was trained at the version that sampled it"
    return f"{mismatch:.1e} mean |log-probability difference| of engine and learner at equal version"


def _evaluation_lines(evaluation: Mapping[str, EvaluationResult]) -> list[str]:
    if not evaluation:
        return ["accuracy    not evaluated"]
    lines: list[str] = []
    for key, title in EVALUATIONS.items():
        if result := evaluation.get(key):
            lines.append(f"{title:<12}{render_evaluation(result)}")
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
