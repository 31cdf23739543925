"""The figures of all parts as a table for people, and the ratios that say how good they are. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.benchmarks.measured import Measured


@dataclass(frozen=True)
class Ratio:
    """The longest of some median steps over the longest of others."""

    meaning: str
    over: str
    under: tuple[str, ...]

    def value(self, parts: Mapping[str, Measured]) -> float | None:
        """None where one of the parts was not run."""
        if not {self.over, *self.under} <= parts.keys():
            return None
        return parts[self.over].median_step / max(parts[name].median_step for name in self.under)

    @property
    def formula(self) -> str:
        """As it is printed."""
        under = self.under[0] if len(self.under) == 1 else f"max({', '.join(self.under)})"
        return f"{self.over} / {under}"


ALONE = ("rollout-alone", "learner-alone")
RATIOS = (
    Ratio("above the ideal pipeline; 1 is perfect", "rlsys-s1", ALONE),
    Ratio("above the ideal pipeline; 1 is perfect", "rlsys-s1-streaming", ALONE),
    Ratio("times faster than TRL's asynchronous trainer", "trl-async", ("rlsys-s1",)),
    Ratio("times faster than TRL's asynchronous trainer", "trl-async", ("rlsys-s1-streaming",)),
    Ratio("what asynchrony gains on the same cores", "rlsys-s0", ("rlsys-s1",)),
    Ratio("what asynchrony gains on the same cores, streaming", "rlsys-s0-streaming", ("rlsys-s1-streaming",)),
)


def ratios(parts: Mapping[str, Measured]) -> dict[str, float]:
    """Those whose parts were run, by formula."""
    return {ratio.formula: value for ratio in RATIOS if (value := ratio.value(parts)) is not None}


def _number(form: str, value: float | None) -> str:
    return "-" if value is None else format(value, form)


def _staleness(one: Measured) -> str:
    return "-" if one.staleness_max is None else f"{one.staleness_mean:.2f} / {one.staleness_max:.0f}"


COLUMNS: Mapping[str, Callable[[Measured], str]] = {
    "s/step": lambda one: f"{one.median_step:.2f}",
    "min-max": lambda one: f"{min(one.step_seconds):.2f}-{max(one.step_seconds):.2f}",
    "traj/s": lambda one: _number(".1f", one.rates()["trajectories_per_second"]),
    "generated tok/s": lambda one: _number(".0f", one.per_second(one.generated_tokens)),
    "trained tok/s": lambda one: _number(".0f", one.per_second(one.trained_tokens)),
    "tok/completion": lambda one: _number(".1f", one.completion_tokens_mean),
    "learner idle": lambda one: _number(".0%", one.learner_idle),
    "rollout idle": lambda one: _number(".0%", one.rollout_idle),
    "staleness": _staleness,
    "thrown away tok": lambda one: _number(".0f", one.thrown_away_tokens),
    "peak MB": lambda one: _number(".0f", one.peak_memory_mb),
}


def render(parts: Mapping[str, Measured]) -> str:
    """The table, who was the bottleneck of each part, and the ratios."""
    rows = [["", *COLUMNS], *([name, *(show(one) for show in COLUMNS.values())] for name, one in parts.items())]
    lines = [_aligned(rows), ""]
    lines += [f"{name}: {one.bottleneck}" for name, one in parts.items() if one.bottleneck]
    lines += [""]
    for ratio in RATIOS:
        value = ratio.value(parts)
        if value is not None:
            lines.append(f"{value:6.2f}  {ratio.formula}  ({ratio.meaning})")
    return "\n".join(lines).rstrip()


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
