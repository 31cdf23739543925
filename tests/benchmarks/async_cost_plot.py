"""What a person sees of the study "does asynchrony cost learning?": `study.json`, `study.md`, the figure.

Stands after `async_cost_analysis`, which has the numbers and says what they mean. Invariant: whatever part of the study
is there is told, and what is missing or failed is told too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks.async_cost_analysis import (
    HOLDS,
    Axis,
    Cell,
    Comparison,
    Curve,
    Estimate,
    Floats,
    Quantity,
    Results,
    compare,
    target_reward,
    verdict,
)

TITLES = {
    "default": "default: DPPO",
    "none": "no correction: REINFORCE",
    "decoupled": "decoupled PPO",
}
COLORS = ("#111111", "#4b2a86", "#2f6f9f", "#1f9e77", "#b5a100")
"""From synchronous on: dark to light, purple to yellow, in the order of viridis, so that they also differ in grey."""
LINE_STYLES = ("--", "-", "-", "-", "-")
SMOOTHED_SHARE = 0.2
"""A drawn reward is a mean over this share of its line's length; the numbers in the tables are not smoothed."""
GRID_POINTS = 50


# ---------------------------------------------------------------- numbers


def write_study(out: Path, results: Results, missing: Sequence[Cell], failures: Mapping[str, str]) -> str:
    """Write `study.json` and `study.md` into `out`; returns the second."""
    target = target_reward(results)
    comparisons = [
        found
        for correction, staleness in conditions(results)
        if staleness > 0 and (found := compare(results, (correction, staleness), (correction, 0), target)) is not None
    ]
    noise = [
        found
        for correction, staleness in conditions(results)
        if staleness == 0
        and correction != "default"
        and (found := compare(results, (correction, 0), ("default", 0), target)) is not None
    ]
    told = {
        "target_reward": target,
        "claim": _claim(comparisons),
        "cells": {cell.name: _cell_dict(results, cell, target) for cell in results},
        "against_synchronous": [_comparison_dict(one) for one in comparisons],
        "noise_of_repetition": [_comparison_dict(one) for one in noise],
        "missing": [cell.name for cell in missing],
        "failures": dict(failures),
    }
    (out / "study.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    text = _markdown(results, target, comparisons, noise, missing, failures)
    (out / "study.md").write_text(text, encoding="utf-8")
    return text


def conditions(results: Results) -> list[tuple[str, int]]:
    """Correction and bound of the cells that are there: the default first, bounds ascending."""
    order = list(TITLES)
    return sorted(
        {(cell.correction, cell.staleness) for cell in results}, key=lambda one: (order.index(one[0]), one[1])
    )


def _cell_dict(results: Results, cell: Cell, target: float) -> dict[str, Any]:
    one = results[cell]
    return {
        "final_accuracy": one.final_accuracy,
        "final_interval": list(one.final_interval),
        "staleness_mean": one.staleness,
        "ess_fraction_mean": one.ess_fraction,
        "trained_tokens": one.tokens,
        "grpo_seconds": one.seconds,
        "to_target": {axis.value: one.curves[Quantity.REWARD, axis].reaches(target) for axis in Axis},
        "curves": {
            f"{quantity.value}_by_{axis.value}": [curve.x_N.round(1).tolist(), curve.y_N.round(4).tolist()]
            for (quantity, axis), curve in one.curves.items()
        },
    }


def _comparison_dict(one: Comparison) -> dict[str, Any]:
    return {**asdict(one), "verdict": verdict(one)}


def _claim(comparisons: Sequence[Comparison]) -> str:
    """The sentence about the shipped default."""
    claim = "The shipped default at S = 1 lies within noise of S = 0 against tokens and ahead against wall time"
    found = [one for one in comparisons if (one.correction, one.staleness) == ("default", 1)]
    if not found:
        return f"{claim}: not measured."
    (one,) = found
    tokens, seconds = one.reward_difference[Axis.TOKENS], one.reward_difference[Axis.SECONDS]
    said = verdict(one)
    outcome = "holds" if said == HOLDS else said if tokens.low is None else f"does not hold ({said})"
    blind = "" if tokens.high is None else f" (a difference below {tokens.high - tokens.mean:.3f} could not be seen)"
    return (
        f"{claim}: {outcome}. "
        f"Mean reward, S = 1 less S = 0, {len(one.seeds)} seeds: {tokens} over the same tokens{blind}, "
        f"{seconds} over the same time; held-out accuracy after the last step {one.accuracy_difference}; the same "
        f"tokens take {one.duration_ratio} of the time."
    )


def _markdown(
    results: Results,
    target: float,
    comparisons: Sequence[Comparison],
    noise: Sequence[Comparison],
    missing: Sequence[Cell],
    failures: Mapping[str, str],
) -> str:
    by_condition = {(one.correction, one.staleness): one for one in comparisons}
    lines = [
        "# Does asynchrony cost learning?",
        "",
        _claim(comparisons),
        "",
        f"Means over seeds, 95 % intervals (Student's t). Target reward {target:.2f}; x: times what S = 0 of the same "
        "correction needs. Difference: mean reward over the common range, less that of S = 0, paired by seed.",
        "",
        "| loss | S | seeds | staleness | ESS | held-out accuracy | tokens to target | minutes to target "
        "| difference, same tokens | difference, same time | time for the same tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for correction, staleness in conditions(results):
        paired = by_condition.get((correction, staleness))
        cells = [one for cell, one in results.items() if cell[:2] == (correction, staleness)]
        costs = [
            _cost([one.curves[Quantity.REWARD, axis].reaches(target) for one in cells], unit, paired, axis)
            for axis, unit in ((Axis.TOKENS, 1000.0), (Axis.SECONDS, 60.0))
        ]
        lines.append(
            f"| {TITLES[correction]} | {staleness} | {len(cells)} | {np.mean([one.staleness for one in cells]):.2f} | "
            f"{np.mean([one.ess_fraction for one in cells]):.2f} | "
            f"{Estimate.of([one.final_accuracy for one in cells])} | {costs[0]} | {costs[1]} | "
            + " | ".join(str(paired.reward_difference[axis]) if paired else "" for axis in Axis)
            + f" | {f'{paired.duration_ratio}x' if paired else ''} |"
        )
    if noise:
        lines += ["", "At S = 0 all three losses have the same gradient, so these differences are noise of repetition:"]
        lines += [
            f"- {TITLES[one.correction]} less default: {one.reward_difference[Axis.TOKENS]} over the same tokens, "
            f"{one.reward_difference[Axis.SECONDS]} over the same time"
            for one in noise
        ]
    lines += ["", *(f"Failed: {name}: {why}" for name, why in failures.items())] if failures else []
    lines += ["", f"Not run yet: {', '.join(cell.name for cell in missing)}"] if missing else []
    return "\n".join(lines) + "\n"


def _cost(values: Sequence[float | None], unit: float, paired: Comparison | None, axis: Axis) -> str:
    """Mean cost of the target, in units, and its ratio; a count where some runs do not reach it."""
    reached = [value / unit for value in values if value is not None]
    if len(reached) < len(values):
        return f"reached by {len(reached)} of {len(values)}"
    suffix = "k" if axis is Axis.TOKENS else ""
    ratio = paired.target_ratio[axis] if paired else None
    return f"{np.mean(reached):.{0 if suffix else 2}f}{suffix}" + (f" ({ratio.mean:.2f}x)" if ratio else "")


# ---------------------------------------------------------------- the figure


class Band(NamedTuple):
    """Runs of one condition on a common grid: mean, least and greatest over seeds."""

    x_N: Floats
    mean_N: Floats
    low_N: Floats
    high_N: Floats


def band(curves: Sequence[Curve]) -> Band | None:
    """Over the range where every curve is; None where there is none."""
    low = max((curve.x_N[0] for curve in curves if len(curve.x_N)), default=np.inf)
    high = min((curve.x_N[-1] if len(curve.x_N) else -np.inf for curve in curves), default=-np.inf)
    if not low < high:
        return None
    x_N = np.linspace(low, high, GRID_POINTS)
    y_SN = np.array([curve.at(x_N) for curve in curves])
    return Band(x_N, y_SN.mean(axis=0), y_SN.min(axis=0), y_SN.max(axis=0))


UNITS = {Axis.TOKENS: (1000.0, "trained tokens, thousands"), Axis.SECONDS: (60.0, "wall minutes of GRPO")}
LABELS = {Quantity.REWARD: "reward of the policy", Quantity.ACCURACY: "validation accuracy"}


def draw(figure: Path, results: Results, quantity: Quantity) -> None:
    """A column for each correction, a row for each axis, a line for each bound; the ending names the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 11, "svg.fonttype": "path", "font.family": "DejaVu Sans"})
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    corrections = list(dict.fromkeys(correction for correction, _ in conditions(results)))
    bounds = sorted({cell.staleness for cell in results})
    drawing, panels = plt.subplots(
        len(Axis),
        len(corrections),
        figsize=(1.2 + 3.1 * len(corrections), 6.6),
        sharey=True,
        sharex="row",
        squeeze=False,
    )
    for row, axis in enumerate(Axis):
        for column, correction in enumerate(corrections):
            panel = panels[row][column]
            for rank, bound in enumerate(bounds):
                cells = [one for cell, one in results.items() if cell[:2] == (correction, bound)]
                _draw_line(panel, [one.curves[quantity, axis] for one in cells], axis, quantity, rank, bound)
            panel.set_xlabel(UNITS[axis][1])
            panel.grid(color="#e6e6e6", linewidth=0.8)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xlim(left=0)
            panel.xaxis.set_major_locator(MaxNLocator(4))
            panel.xaxis.set_major_formatter("{x:g}")
            if row == 0:
                panel.set_title(TITLES[correction], fontsize=12, pad=8)
        panels[row][0].set_ylabel(LABELS[quantity])
    handles, labels = _legend(panels)
    drawing.legend(handles, labels, loc="upper center", ncols=len(bounds), frameon=False, columnspacing=1.6)
    smoothed = f", smoothed over {SMOOTHED_SHARE:.0%} of its length" if quantity is Quantity.REWARD else ""
    note = f"line: mean over seeds{smoothed}; band: least to greatest seed"
    drawing.text(0.5, 0.012, note, ha="center", fontsize=9.5, color="#555555")
    drawing.tight_layout(rect=(0, 0.035, 1, 0.94), h_pad=1.4)
    drawing.savefig(figure, dpi=160, facecolor="white", metadata={"Date": None} if figure.suffix == ".svg" else None)
    plt.close(drawing)


def _legend(panels: Any) -> tuple[list[Any], list[str]]:
    found = {
        label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    labels = sorted(found, key=lambda label: int(label.split()[2]))
    return [found[label] for label in labels], labels


def _draw_line(panel: Any, curves: Sequence[Curve], axis: Axis, quantity: Quantity, rank: int, bound: int) -> None:
    smoothing = SMOOTHED_SHARE if quantity is Quantity.REWARD else 0.0
    drawn = band([curve.smoothed(smoothing) for curve in curves])
    if drawn is None:
        return
    x_N, color = drawn.x_N / UNITS[axis][0], COLORS[rank % len(COLORS)]
    label = f"S = {bound}{' (synchronous)' if bound == 0 else ''}"
    panel.fill_between(x_N, drawn.low_N, drawn.high_N, color=color, alpha=0.13, linewidth=0)
    panel.plot(
        x_N, drawn.mean_N, color=color, linestyle=LINE_STYLES[rank % len(LINE_STYLES)], linewidth=2.0, label=label
    )
