"""The study of asynchrony's cost: its numbers on metrics that are made up here, its runs on a scripted `rlsys`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.errors import ConfigError
from rlsys.metrics import METRICS
from tests.benchmarks.async_cost import BASE, Study, main, plan
from tests.benchmarks.async_cost_analysis import (
    HOLDS,
    Axis,
    Cell,
    CellResult,
    Curve,
    Estimate,
    Quantity,
    compare,
    learning_curves,
    mean_difference,
    t_quantile,
    target_reward,
    verdict,
    writing_versions,
)
from tests.benchmarks.async_cost_plot import band, draw, write_study


def array(*values: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)


def metric_lines(
    rewards: Sequence[float], *, queue: int = 0, seconds: float = 1.0, groups: int = 2, tokens: float = 10.0
) -> list[dict[str, float]]:
    """A run whose policy version v earns `rewards[v]`, one version a step, and whose groups wait `queue` steps after
    they were written: the groups that step k trains were written by version k - 1 - queue, or by version 0."""
    steps = len(rewards)
    lines: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "group/trained": groups * step,
            "group/buffer_depth": groups * queue,
            "staleness/mean": min(step - 1, queue),
            "tokens/trained": tokens * step,
            "time/grpo_seconds": seconds * step,
            "reward/total": rewards[step - 1],
            "train/ess_fraction": 0.9,
        }
        lines.append(line)
    return lines


def result(lines: Sequence[Mapping[str, float]], final_accuracy: float = 0.9) -> CellResult:
    last = lines[-1]
    return CellResult(
        learning_curves(lines), final_accuracy, (0.8, 0.95), 1.0, 0.9, last["tokens/trained"], last["time/grpo_seconds"]
    )


# ---------------------------------------------------------------- which version wrote a step's rewards


def test_a_synchronous_step_was_written_by_the_version_before_it() -> None:
    versions = writing_versions(array(4, 8, 12), array(0, 0, 0), array(0, 0, 0))
    assert versions.tolist() == [0, 1, 2]


def test_groups_that_wait_for_the_learner_count_for_the_version_that_wrote_them() -> None:
    # P = 2. Step 1: groups 0-3 are finished, 0 and 1 trained; all by version 0. Step 2: groups 4, 5 by version 1.
    # Step 3: groups 6, 7 by version 2. Trained are 0, 1 | 2, 3 | 4, 5: staleness 0 | 1 - 0 | 2 - 1. The groups 6 and 7
    # are left over; as stale as the last (1), step 4 would train what version 2 wrote.
    assert writing_versions(array(2, 4, 6), array(2, 2, 2), array(0, 1, 1)).tolist() == [0, 1, 2]
    # Slow engines instead: nothing waits, and all of step 2 and 3 was begun one version earlier.
    assert writing_versions(array(2, 4, 6), array(0, 0, 0), array(0, 1, 1)).tolist() == [0, 0, 1]
    # Half of what step 2 finished is of version 0 (group 3, trained by it), half of version 1 (group 4, by step 3).
    assert writing_versions(array(2, 4, 6), array(1, 1, 0), array(0, 1, 1)).tolist() == [0, 0.5, 1]


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """P; the version that wrote each batch; the step during which each group was finished."""
    groups, steps = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    versions: list[int] = []
    finished: list[int] = []
    for batch in range(1, steps + 1):  # the batch that step `batch` trains
        versions.append(draw(st.integers(versions[-1] if versions else 0, batch - 1)))
        for _ in range(groups):
            earliest = max(versions[-1] + 1, finished[-1] if finished else 1)
            finished.append(draw(st.integers(earliest, batch)))
    return groups, versions, finished


@given(pipelines())
def test_the_versions_are_those_of_the_groups_counted_one_by_one(pipeline: tuple[int, list[int], list[int]]) -> None:
    groups, versions, finished = pipeline
    steps = range(1, len(versions) + 1)
    waiting = [sum(end <= step for end in finished) - groups * step for step in steps]
    staleness = [step - 1 - version for step, version in zip(steps, versions, strict=True)]
    found = writing_versions(array(*(groups * step for step in steps)), array(*waiting), array(*staleness))
    for step in steps:
        written = [versions[number // groups] for number, end in enumerate(finished) if end == step]
        if written:
            assert found[step - 1] == pytest.approx(np.mean(written))


def test_a_queue_alone_is_not_slow_learning() -> None:
    # The same learner, step for step; in one run each group waits three steps before it is trained.
    rewards = [0.1 * step for step in range(10)]
    prompt, queued = (learning_curves(metric_lines(rewards, queue=queue)) for queue in (0, 3))
    for axis in Axis:
        difference = mean_difference(queued[Quantity.REWARD, axis], prompt[Quantity.REWARD, axis])
        assert difference == pytest.approx(0)


def test_a_reward_stands_where_its_policy_came_to_be() -> None:
    curves = learning_curves(metric_lines([0.5, 0.6, 0.7], seconds=3, tokens=100))
    # Version 0 has been trained on nothing, version 2 on two steps.
    assert curves[Quantity.REWARD, Axis.TOKENS].x_N.tolist() == [0, 100, 200]
    assert curves[Quantity.REWARD, Axis.SECONDS].x_N.tolist() == [0, 3, 6]
    assert curves[Quantity.REWARD, Axis.SECONDS].y_N.tolist() == [0.5, 0.6, 0.7]


def test_held_out_accuracy_stands_where_its_version_came_to_be() -> None:
    lines = metric_lines([0.5, 0.6, 0.7, 0.8], seconds=3, tokens=100)
    curves = learning_curves(lines, [{"phase": "grpo", "step": 2, "accuracy": 0.75}])
    assert curves[Quantity.ACCURACY, Axis.TOKENS].x_N.tolist() == [200]
    assert curves[Quantity.ACCURACY, Axis.SECONDS].y_N.tolist() == [0.75]


def test_a_step_in_which_nothing_was_finished_leaves_no_point() -> None:
    lines = metric_lines([0.5, 0.6, 0.7])
    del lines[1]["reward/total"]
    assert learning_curves(lines)[Quantity.REWARD, Axis.TOKENS].y_N.tolist() == [0.5, 0.7]


def test_the_metrics_that_the_study_reads_are_reported_by_runs() -> None:
    assert {*metric_lines([1.0])[0]} - {"step"} <= set(METRICS)


# ---------------------------------------------------------------- curves


def test_points_at_one_place_become_their_mean() -> None:
    curve = Curve.of(array(2, 1, 1, 3), array(5, 2, 4, np.nan))
    assert (curve.x_N.tolist(), curve.y_N.tolist()) == ([1, 2], [3, 5])


def test_the_mean_of_a_curve_is_its_area_over_its_length() -> None:
    curve = Curve(array(0, 2, 4), array(0, 2, 2))
    assert curve.mean(0, 4) == pytest.approx((2 + 4) / 4)
    # From 1 to 3: from 1 up to 2 over one unit (area 1.5), then 2 over one unit.
    assert curve.mean(1, 3) == pytest.approx((1.5 + 2) / 2)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_the_rising_curve_is_the_monotone_regression(values: list[int]) -> None:
    places = range(len(values))
    # The max-min formula (Barlow et al. 1972): greatest over beginnings of the least over ends of the mean between.
    slow = [
        max(min(float(np.mean(values[low : high + 1])) for high in places if high >= i) for low in places if low <= i)
        for i in places
    ]
    rising = Curve(np.arange(len(values), dtype=np.float64), array(*values)).rising()
    assert rising.y_N.tolist() == pytest.approx(slow)


def test_a_lucky_step_does_not_reach_the_target() -> None:
    # The 0.9 is pooled with what follows: 0.2, then 0.9, 0.3, 0.6 become 0.6, then 1.0. At 0.8 halfway from 3 to 4.
    curve = Curve(array(0, 1, 2, 3, 4), array(0.2, 0.9, 0.3, 0.6, 1.0))
    assert curve.reaches(0.8) == pytest.approx(3.5)
    assert curve.reaches(1.1) is None
    assert curve.reaches(0.1) == 0


def test_smoothing_takes_the_mean_of_what_is_around() -> None:
    # A window of half of the length 4 reaches 1 each way: not from 2 to 4.
    assert Curve(array(0, 1, 2, 4), array(0, 3, 9, 5)).smoothed(0.5).y_N.tolist() == [1.5, 4, 6, 5]
    assert Curve(array(), array()).smoothed(0.5).y_N.tolist() == []


# ---------------------------------------------------------------- over seeds


def test_the_interval_is_student_s() -> None:
    # Standard deviation 1, three seeds: 4.303 / sqrt(3) = 2.484 each way.
    mean, low, high = Estimate.of([1, 2, 3])
    assert (mean, low, high) == (2, pytest.approx(-0.484, abs=1e-3), pytest.approx(4.484, abs=1e-3))
    assert Estimate.of([0.5]) == (0.5, None, None)


def test_quantiles_go_on_beyond_the_table() -> None:
    # 2.201 and 1.980 are the tabled quantiles of 11 and 120 degrees of freedom.
    assert (t_quantile(11), t_quantile(120)) == (pytest.approx(2.201, abs=3e-3), pytest.approx(1.980, abs=1e-3))


def synthetic_study(bounds: Sequence[int] = (0, 1), lead: float = 0.0) -> dict[Cell, CellResult]:
    """Seeds that differ much from each other; S > 0 is twice as fast and `lead` better, give or take 0.01."""
    results: dict[Cell, CellResult] = {}
    for seed, noise in ((0, -0.01), (1, 0.0), (2, 0.01)):
        for bound in bounds:
            shift = seed + (lead + noise if bound else 0.0)
            rewards = [shift + 0.1 * step for step in range(8)]
            lines = metric_lines(rewards, seconds=0.5 if bound else 1.0)
            results[Cell("default", bound, seed)] = result(lines, final_accuracy=0.8 + (0.1 if bound else 0.0))
    return results


def test_runs_are_compared_within_their_seeds() -> None:
    found = compare(synthetic_study(lead=0.2), ("default", 1), ("default", 0), target=99)
    assert found is not None
    assert found.seeds == (0, 1, 2)
    tokens, seconds = found.reward_difference[Axis.TOKENS], found.reward_difference[Axis.SECONDS]
    # Seeds are a whole unit apart, and that is not in the interval: 0.01 * 4.303 / sqrt(3) each way.
    assert tokens == (pytest.approx(0.2), pytest.approx(0.2 - 0.0248, abs=1e-4), pytest.approx(0.2 + 0.0248, abs=1e-4))
    # Common range: 3.5 s (version 7 of the fast run). Fast: 0.2 a second, slow: 0.1; on average 1.75 s of them.
    assert seconds.mean == pytest.approx(0.2 + 0.1 * 1.75)
    assert found.accuracy_difference.mean == pytest.approx(0.1)
    assert found.target_ratio == {Axis.TOKENS: None, Axis.SECONDS: None}


def test_the_time_of_the_same_tokens_is_a_ratio_within_seeds() -> None:
    found = compare(synthetic_study(), ("default", 1), ("default", 0), 0.5)
    assert found is not None
    assert found.duration_ratio.mean == pytest.approx(0.5)


def test_a_seed_that_has_only_one_of_the_two_is_left_out() -> None:
    results = synthetic_study()
    del results[Cell("default", 0, 1)]
    found = compare(results, ("default", 1), ("default", 0), target=99)
    assert found is not None
    assert found.seeds == (0, 2)
    assert compare(results, ("none", 1), ("none", 0), target=99) is None


def test_the_cost_of_the_target_is_a_ratio_within_the_seed() -> None:
    results = {cell: one for cell, one in synthetic_study().items() if cell.seed == 1}  # no noise: rewards from 1 on
    found = compare(results, ("default", 1), ("default", 0), target=1.4)
    assert found is not None
    ratios = found.target_ratio
    assert [ratios[axis] for axis in Axis] == [(pytest.approx(1.0), None, None), (pytest.approx(0.5), None, None)]


def test_the_target_is_three_quarters_of_the_synchronous_gain() -> None:
    # From 1.0 to 1.7 is 1.525; from 1.1 to 1.9, 1.7. Their mean is 1.6125: 1.6 to the nearest 0.05. S = 1 has no say.
    ends = {Cell("default", 0, 0): (1.0, 1.7), Cell("none", 0, 0): (1.1, 1.9), Cell("default", 1, 0): (5.0, 9.0)}
    assert target_reward({cell: result(metric_lines(pair)) for cell, pair in ends.items()}) == 1.6


@pytest.mark.parametrize(
    ("lead", "said"),
    [
        (0.0, HOLDS),
        (0.2, "ahead against tokens, ahead against wall time"),
        (-0.3, "behind against tokens, behind against wall time"),
        (-0.175, "behind against tokens, within noise against wall time"),
    ],
)
def test_the_verdict_reads_both_intervals(lead: float, said: str) -> None:
    found = compare(synthetic_study(lead=lead), ("default", 1), ("default", 0), target=99)
    assert found is not None
    assert verdict(found) == said


def test_one_seed_decides_nothing() -> None:
    results = {cell: one for cell, one in synthetic_study().items() if cell.seed == 0}
    found = compare(results, ("default", 1), ("default", 0), target=99)
    assert found is not None
    assert verdict(found).startswith("undecided")


# ---------------------------------------------------------------- what people look at


def test_a_band_spans_the_seeds_where_all_of_them_are() -> None:
    found = band([Curve(array(0, 4), array(0, 4)), Curve(array(1, 5), array(3, 7))])
    assert found is not None
    assert (found.x_N[0], found.x_N[-1]) == (1, 4)
    assert (found.low_N[0], found.mean_N[0], found.high_N[0]) == (1, 2, 3)
    assert band([Curve(array(), array())]) is None


def test_the_study_tells_its_claim_and_what_is_missing(tmp_path: Path) -> None:
    text = write_study(tmp_path, synthetic_study(), [Cell("none", 8, 2)], {"none-s8-seed2": "exit code 3"})
    assert "wall time: holds." in text
    assert "Not run yet: none-s8-seed2" in text
    assert "Failed: none-s8-seed2: exit code 3" in text
    assert text == (tmp_path / "study.md").read_text()
    told = json.loads((tmp_path / "study.json").read_text())
    assert told["against_synchronous"][0]["verdict"] == HOLDS
    assert set(told["cells"]) == {cell.name for cell in synthetic_study()}


def test_the_claim_is_neither_made_nor_refused_on_one_seed(tmp_path: Path) -> None:
    results = {cell: one for cell, one in synthetic_study().items() if cell.seed == 0}
    assert "wall time: undecided: one seed has no interval." in write_study(tmp_path, results, [], {})


def test_the_claim_is_refused_where_learning_is_slower(tmp_path: Path) -> None:
    text = write_study(tmp_path, synthetic_study(lead=-0.3), [], {})
    assert "does not hold (behind against tokens, behind against wall time)" in text


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_figure_is_drawn_from_what_is_there(tmp_path: Path, ending: str) -> None:
    draw(tmp_path / f"reward.{ending}", synthetic_study(), Quantity.REWARD)
    assert (tmp_path / f"reward.{ending}").stat().st_size > 5000


# ---------------------------------------------------------------- the runs


class ScriptedRlsys:
    """Notes what it is asked for; a run whose name is in `failing` leaves nothing and exits with 3."""

    def __init__(self, failing: Sequence[str] = ()) -> None:
        self.failing = failing
        self.asked: list[list[str]] = []

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        self.asked.append(list(arguments))
        if self.names[-1] in self.failing:
            return 3
        run = Path(arguments[-1]) / self.names[-1]
        run.mkdir()  # like the real one, it never writes into a directory that is there
        (run / "policy").mkdir()
        evaluated = {"accuracy": 0.9, "interval": [0.8, 0.95]}
        summary = {"status": "finished", "staleness": {"mean": 1.0}, "evaluation": {"after_grpo": evaluated}}
        (run / "summary.json").write_text(json.dumps(summary))
        lines = [{"phase": "grpo", **line} for line in metric_lines([0.1, 0.2])]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    @property
    def names(self) -> list[str]:
        return [one.removeprefix("name=") for asked in self.asked for one in asked if one.startswith("name=")]


def study(out: Path, rlsys: ScriptedRlsys, said: list[str] | None = None) -> Study:
    made = Study(out, rlsys, (said if said is not None else []).append)
    made.begin(BASE, ["grpo.steps=2"])
    return made


def test_the_default_comes_first_a_seed_at_a_time_with_its_bounds_in_a_row() -> None:
    cells = plan(["none", "default"], [1, 0], [5, 6])
    assert [cell.name for cell in cells] == [
        *("default-s0-seed5", "default-s1-seed5", "default-s0-seed6", "default-s1-seed6"),
        *("none-s0-seed5", "none-s1-seed5", "none-s0-seed6", "none-s1-seed6"),
    ]


def test_all_cells_of_a_seed_start_from_one_warm_start(tmp_path: Path) -> None:
    rlsys = ScriptedRlsys()
    study(tmp_path, rlsys).run(plan(["default", "none"], [0, 8], [0, 1]))
    assert rlsys.names.count("warm-seed0") == rlsys.names.count("warm-seed1") == 1
    assert len(rlsys.names) == 2 + 8
    for asked in rlsys.asked:
        if asked[0] == "train":
            seed = next(one for one in asked if one.startswith("seed=")).removeprefix("seed=")
            assert f"policy.path={tmp_path.resolve()}/warm-seed{seed}/policy" in asked
            assert {"sft=null", "policy.kind=pretrained"} <= set(asked)


def test_a_study_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    cells = plan(["default"], [0, 1, 2], [0])
    study(tmp_path, ScriptedRlsys()).run(cells[:1])
    cut_short = tmp_path / cells[1].name
    cut_short.mkdir()
    (cut_short / "metrics.jsonl").write_text("half a run")
    rlsys = ScriptedRlsys()
    study(tmp_path, rlsys).run(cells)
    assert rlsys.names == [cells[1].name, cells[2].name]
    assert "half" not in (cut_short / "metrics.jsonl").read_text()


def test_a_failing_cell_is_noted_and_the_others_are_run(tmp_path: Path) -> None:
    cells = plan(["default"], [0, 1, 2], [0])
    said: list[str] = []
    failing = study(tmp_path, ScriptedRlsys([cells[1].name]), said)
    failing.run(cells)
    assert list(failing.failures()) == [cells[1].name]
    assert [failing.result(cell) is not None for cell in cells] == [True, False, True]
    assert "FAILED: exit code 3" in said[2]
    assert "Failed: default-s1-seed0" in failing.tell(cells)
    study(tmp_path, ScriptedRlsys()).run(cells)
    assert failing.failures() == {}


def test_a_failing_warm_start_is_not_tried_again_for_every_cell(tmp_path: Path) -> None:
    rlsys = ScriptedRlsys(["warm-seed0"])
    failing = study(tmp_path, rlsys)
    failing.run(plan(["default"], [0, 1], [0, 1]))
    assert rlsys.names == ["warm-seed0", "warm-seed1", "default-s0-seed1", "default-s1-seed1"]
    assert len(failing.failures()) == 2


def test_cells_of_two_configurations_are_never_mixed(tmp_path: Path) -> None:
    study(tmp_path, ScriptedRlsys())
    with pytest.raises(ConfigError, match="cells of another configuration"):
        Study(tmp_path, ScriptedRlsys(), print).begin(BASE, ["grpo.steps=3"])


def test_a_directory_s_cells_are_found_again_among_everything_else(tmp_path: Path) -> None:
    made = study(tmp_path, ScriptedRlsys())
    made.run(plan(["default", "none"], [0, 16], [3]))
    (tmp_path / "default-s0-seed3-copy").mkdir()
    assert sorted(made.cells()) == sorted(plan(["default", "none"], [0, 16], [3]))


def test_a_study_without_a_finished_cell_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished cell yet"):
        study(tmp_path, ScriptedRlsys()).tell([Cell("default", 0, 0)])


def test_the_command_says_in_a_line_what_a_user_can_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "--out", str(tmp_path), "--figure", str(tmp_path / "reward.svg")]) == 2
    assert "no finished cell yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plot", "--out", str(tmp_path), "--figure", "reward.txt"])
    assert "ends in .svg or .png" in capsys.readouterr().err
