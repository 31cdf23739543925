"""The study "does asynchrony cost learning?": run directories -> curves, paired differences, a verdict, tables.

Stands behind `tests.benchmarks.async_cost`, which makes the runs. Nothing here draws, trains or waits.

A step's reward is the mean over the trajectories that were finished during the step, whoever wrote them. A learning
curve must say what a policy earns against what that policy was trained on, so each reward stands at the tokens and the
seconds of the version that wrote it (`writing_versions`), not at those of the step that reported it: otherwise a
long queue would look like slow learning.

Endpoint: the mean reward over the range of tokens (or seconds) that two runs have in common, which is the area under
the curve over the range's length. Runs of one seed share the warm start, the problems and their order, so S and 0 are
compared within seeds; intervals are Student's over seeds.

Invariant: the same directories give the same numbers; nothing here is random.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TARGET_SHARE = 0.75
"""The target reward: this share of the way that the synchronous runs go from their first reward to their last."""


class Axis(StrEnum):
    """What learning is measured against."""

    TOKENS = "tokens"
    """Tokens that counted in the loss."""
    SECONDS = "seconds"
    """Wall seconds of the GRPO phase."""


class Quantity(StrEnum):
    """What is measured."""

    REWARD = "reward"
    """Of training rollouts."""
    ACCURACY = "accuracy"
    """Of sampled answers to validation problems, evaluated by one version while training goes on."""


class Cell(NamedTuple):
    """One run of the study."""

    correction: str
    staleness: int
    seed: int

    @property
    def name(self) -> str:
        """Of the run and its directory."""
        return f"{self.correction}-s{self.staleness}-seed{self.seed}"


@dataclass(frozen=True)
class Curve:
    """A learning curve: x strictly ascending, linear between its points."""

    x_N: Floats
    y_N: Floats

    @classmethod
    def of(cls, x_N: Floats, y_N: Floats) -> Curve:
        """Points in any order; those without a value are left out, those at one x become their mean."""
        known = np.isfinite(y_N)
        x_M, places = np.unique(x_N[known], return_inverse=True)
        return cls(x_M, np.bincount(places, weights=y_N[known]) / np.bincount(places) if len(x_M) else y_N[known])

    def at(self, x_N: Floats) -> Floats:
        """Values at `x_N`, which lie inside the curve."""
        return np.interp(x_N, self.x_N, self.y_N)

    def mean(self, low: float, high: float) -> float:
        """Mean value over [low, high]: area under the curve / length. Both lie inside the curve, low < high."""
        inside = (self.x_N > low) & (self.x_N < high)
        x_N = np.concatenate([[low], self.x_N[inside], [high]])
        return float(np.trapezoid(self.at(x_N), x_N) / (high - low))

    def smoothed(self, share: float) -> Curve:
        """Each value the mean of those around it, in a window of this share of the curve's length; for looking only."""
        half = share / 2 * float(np.ptp(self.x_N)) if len(self.x_N) else 0.0
        windows = [self.y_N[np.abs(self.x_N - x) <= half] for x in self.x_N]
        return Curve(self.x_N, np.array([window.mean() for window in windows]))

    def rising(self) -> Curve:
        """The non-decreasing curve nearest in least squares (pool adjacent violators; Ayer et al. 1955)."""
        blocks: list[tuple[float, int]] = []
        for value in self.y_N:
            mean, size = float(value), 1
            while blocks and blocks[-1][0] > mean:
                before, number = blocks.pop()
                mean, size = (before * number + mean * size) / (number + size), number + size
            blocks.append((mean, size))
        return Curve(self.x_N, np.repeat([mean for mean, _ in blocks], [size for _, size in blocks]))

    def reaches(self, target: float) -> float | None:
        """Where the rising curve first is at `target`; None where it stays below.

        A lucky step does not count: it is pooled with the worse ones after it.
        """
        y_N = self.rising().y_N
        above = np.flatnonzero(y_N >= target)
        if not len(above):
            return None
        first = int(above[0])
        if first == 0:
            return float(self.x_N[0])
        left, right = first - 1, first
        share = (target - y_N[left]) / (y_N[right] - y_N[left])
        return float(self.x_N[left] + share * (self.x_N[right] - self.x_N[left]))


def writing_versions(trained_K: Floats, waiting_K: Floats, staleness_K: Floats) -> Floats:
    """Mean policy version that wrote the groups finished in each of K steps; between 0 and step - 1.

    `trained_K` groups trained so far, `waiting_K` groups finished and not trained, both at the step's end;
    `staleness_K` mean staleness of the groups that the step trained. Groups are trained in order, so those that were
    finished during step k are numbers trained + waiting at the end of k-1 up to the same at the end of k, and group
    number n, trained by step j, was written by version j - 1 - staleness_j. Groups left over when the run ends
    are taken to be as stale as the last that were trained.
    """
    steps = len(trained_K)
    per_step = trained_K[0]
    left_over = max(0, math.ceil((waiting_K[-1]) / per_step))
    ends = np.concatenate([[0.0], trained_K, trained_K[-1] + per_step * np.arange(1, left_over + 1)])
    versions = np.arange(steps + left_over) - np.concatenate([staleness_K, np.repeat(staleness_K[-1], left_over)])
    summed = np.concatenate([[0.0], np.cumsum(versions * np.diff(ends))])  # over groups, linear inside a step
    finished = trained_K + waiting_K
    low = np.concatenate([[0.0], finished[:-1]])
    low = np.minimum(low, ends[-1] - 1)
    high = np.maximum(finished, low + 1)  # where nothing was finished but what is filtered: as the next group
    mean = (np.interp(high, ends, summed) - np.interp(low, ends, summed)) / (high - low)
    return np.clip(mean, 0, np.arange(steps))


@dataclass(frozen=True)
class CellResult:
    """What one run found."""

    curves: Mapping[tuple[Quantity, Axis], Curve]
    final_accuracy: float
    """Held-out accuracy of the last version, test split."""
    final_interval: tuple[float, float]
    """95 % interval of it over problems."""
    staleness: float
    """Mean staleness of the trained groups."""
    ess_fraction: float
    """Effective sample size of the ratios / loss tokens, mean over steps."""
    tokens: float
    """Trained in all."""
    seconds: float
    """Of the GRPO phase."""


def read_cell(run: Path) -> CellResult | None:
    """The result in a run directory; None where the run is not finished."""
    summary = read_summary(run)
    if summary is None or summary["status"] != "finished":
        return None
    lines = _read_lines(run / "metrics.jsonl")
    final = summary["evaluation"]["after_grpo"]
    return CellResult(
        curves=learning_curves(lines, _read_lines(run / "evaluations.jsonl")),
        final_accuracy=final["accuracy"],
        final_interval=(final["interval"][0], final["interval"][1]),
        staleness=summary["staleness"]["mean"],
        ess_fraction=float(np.nanmean(_column(lines, "train/ess_fraction"))),
        tokens=lines[-1]["tokens/trained"],
        seconds=lines[-1]["time/grpo_seconds"],
    )


def _read_lines(path: Path) -> list[Mapping[str, Any]]:
    """Those of GRPO; none where the file is not there."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in map(json.loads, text.splitlines()) if line["phase"] == "grpo"]


def read_summary(run: Path) -> dict[str, Any] | None:
    """`summary.json` of a run directory; None where there is none."""
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def learning_curves(
    lines: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]] = ()
) -> dict[tuple[Quantity, Axis], Curve]:
    """Both quantities against both axes, from the lines of steps 1, 2, ... of `metrics.jsonl`, and those of
    `evaluations.jsonl`.
    """
    versions = writing_versions(
        _column(lines, "group/trained"), _column(lines, "group/buffer_depth"), _column(lines, "staleness/mean")
    )
    curves: dict[tuple[Quantity, Axis], Curve] = {}
    for axis, name in ((Axis.TOKENS, "tokens/trained"), (Axis.SECONDS, "time/grpo_seconds")):
        x_V = np.concatenate([[0.0], _column(lines, name)])  # where version v came to be

        def at(versions: Floats, x_V: Floats = x_V) -> Floats:
            return np.interp(versions, np.arange(len(x_V)), x_V)

        curves[Quantity.REWARD, axis] = Curve.of(at(versions), _column(lines, "reward/total"))
        curves[Quantity.ACCURACY, axis] = Curve.of(at(_column(evaluations, "step")), _column(evaluations, "accuracy"))
    return curves


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> Floats:
    values = (line.get(name) for line in lines)
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


# ---------------------------------------------------------------- over seeds


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval (Student's t); no interval for one seed."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value for each seed, one or more."""
        mean = float(np.mean(values))
        if len(values) < 2:
            return cls(mean, None, None)
        half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.mean:.3f}{interval}"


# Not scipy's: where scipy is installed, transformers loads it into every process of a run, about 80 MB each.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Z_975 = 1.959964


def t_quantile(freedom: int) -> float:
    """The quantile of Student's t that leaves 2.5 % above it; beyond the table Fisher's expansion, off by < 0.003."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = Z_975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mean_difference(one: Curve, other: Curve) -> float | None:
    """Mean of `one` - mean of `other` over the range that they have in common; None where there is none."""
    if not len(one.x_N) or not len(other.x_N):
        return None
    low, high = max(one.x_N[0], other.x_N[0]), min(one.x_N[-1], other.x_N[-1])
    return one.mean(low, high) - other.mean(low, high) if low < high else None


@dataclass(frozen=True)
class Comparison:
    """Runs at one bound and correction against those that they are paired with, within seeds."""

    correction: str
    staleness: int
    against: str
    seeds: tuple[int, ...]
    reward_difference: Mapping[Axis, Estimate]
    """Of the mean rewards over the common range."""
    accuracy_difference: Estimate
    """Of the final held-out accuracies."""
    duration_ratio: Estimate
    """Wall seconds of all steps / theirs: what the same number of trained tokens takes."""
    target_ratio: Mapping[Axis, Estimate | None]
    """What the target reward costs / what it costs the others; None where a run does not reach it."""


Results = Mapping[Cell, CellResult]


def compare(results: Results, one: tuple[str, int], other: tuple[str, int], target: float) -> Comparison | None:
    """`one` and `other` are a correction and a bound; None where no seed has both."""
    seeds = sorted(cell.seed for cell in results if cell[:2] == one and Cell(*other, cell.seed) in results)
    pairs = [(results[Cell(*one, seed)], results[Cell(*other, seed)]) for seed in seeds]
    if not pairs:
        return None
    differences: dict[Axis, Estimate] = {}
    ratios: dict[Axis, Estimate | None] = {}
    for axis in Axis:
        curves = [(a.curves[Quantity.REWARD, axis], b.curves[Quantity.REWARD, axis]) for a, b in pairs]
        found = [value for a, b in curves if (value := mean_difference(a, b)) is not None]
        if not found:
            return None
        differences[axis] = Estimate.of(found)
        costs = [(a.reaches(target), b.reaches(target)) for a, b in curves]
        quotients = [a / b for a, b in costs if a is not None and b]
        ratios[axis] = Estimate.of(quotients) if len(quotients) == len(pairs) else None
    accuracy = Estimate.of([a.final_accuracy - b.final_accuracy for a, b in pairs])
    duration = Estimate.of([a.seconds / b.seconds for a, b in pairs])
    return Comparison(*one, f"{other[0]}, S = {other[1]}", tuple(seeds), differences, accuracy, duration, ratios)


def target_reward(results: Results) -> float:
    """The reward whose cost is told, to 0.05; from the synchronous runs, or from all where there are none."""
    chosen = [one for cell, one in results.items() if cell.staleness == 0] or list(results.values())
    rising = [one.curves[Quantity.REWARD, Axis.TOKENS].rising().y_N for one in chosen]
    first, last = (float(np.mean([y_N[end] for y_N in rising])) for end in (0, -1))
    return round((first + TARGET_SHARE * (last - first)) * 20) / 20


def verdict(comparison: Comparison) -> str:
    """Whether these runs lie within noise of the others against tokens, and ahead of them against wall time."""
    tokens, seconds = (comparison.reward_difference[axis] for axis in (Axis.TOKENS, Axis.SECONDS))
    if tokens.low is None or tokens.high is None or seconds.low is None or seconds.high is None:
        return "undecided: one seed has no interval"
    if tokens.low > 0:
        against_tokens = "ahead against tokens"
    elif tokens.high < 0:
        against_tokens = "behind against tokens"
    else:
        against_tokens = "within noise against tokens"
    if seconds.low > 0:
        against_time = "ahead against wall time"
    elif seconds.high < 0:
        against_time = "behind against wall time"
    else:
        against_time = "within noise against wall time"
    return f"{against_tokens}, {against_time}"


HOLDS = "within noise against tokens, ahead against wall time"
"""The verdict that the claim about the shipped default needs."""
