"""A reproducible study: does asynchrony cost learning?

    python -m tests.benchmarks.async_cost run --out DIR       make the runs that are not there yet; may be cut short
    python -m tests.benchmarks.async_cost plot --out DIR --figure reward.svg

Cells are staleness bound S x loss x seed. A warm start is made once for each seed, and every cell of the seed trains
its policy, on the same problems in the same order: bounds and losses are compared within seeds. Cells run one after
another, each in a process of its own, since their wall time is measured: leave the machine alone meanwhile.

The order makes a part of the study useful: the shipped default comes first, a seed at a time, all its bounds in
a row. After the first five cells there is one whole comparison, after fifteen the claim about the default; and runs
that are compared are neighbours in time, so that a machine that gets slower hits both.

Invariant: a cell in the tables was made whole, by one process, from the configuration in DIR/base.yaml.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlsys.config_file import dump_config, load_config
from rlsys.errors import ConfigError, RlsysError
from tests.benchmarks.async_cost_analysis import Cell, CellResult, Quantity, read_cell, read_summary
from tests.benchmarks.async_cost_plot import draw, write_study

BASE = Path(__file__).parents[2] / "configs" / "study_async_cost.yaml"

CORRECTIONS = {
    "default": ("grpo.loss.kind=dppo",),
    "none": ("grpo.loss.kind=reinforce", "grpo.correction=null"),
    "decoupled": ("grpo.loss.kind=decoupled_ppo", "grpo.correction=null"),
}
"""What each changes in the base configuration; in the order in which they are run."""

CELL_NAME = re.compile(rf"({'|'.join(CORRECTIONS)})-s(\d+)-seed(\d+)")

CELL_DEADLINE_SECONDS = 3600.0
"""A run that takes longer is ended, and is a failure."""

Execute = Callable[[Sequence[str], Path], int]
"""Runs `rlsys` with arguments and a file for what it prints; returns its exit code."""


def run_rlsys(arguments: Sequence[str], log: Path) -> int:
    """`rlsys` in a process of its own."""
    with log.open("w", encoding="utf-8") as file:
        try:
            return subprocess.run(
                [sys.executable, "-m", "actors.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=CELL_DEADLINE_SECONDS,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            file.write(f"\nended after {CELL_DEADLINE_SECONDS:.0f} s\n")
            return 124


def plan(corrections: Sequence[str], bounds: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """The cells in the order in which they are run (see the module)."""
    return [
        Cell(correction, bound, seed)
        for correction in CORRECTIONS
        if correction in corrections
        for seed in seeds
        for bound in sorted(bounds)
    ]


class Study:
    """The runs below a directory."""

    def __init__(self, out: Path, execute: Execute, say: Callable[[str], None]) -> None:
        self._out = out
        self._execute = execute
        self._say = say
        self._broken_seeds: set[int] = set()

    def begin(self, base: Path, overrides: Sequence[str]) -> None:
        """Write the base configuration. Raises ConfigError where the directory has cells of another one."""
        text = dump_config(load_config(base, overrides))
        kept = self._out / "base.yaml"
        if kept.exists() and kept.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{self._out} holds cells of another configuration (base.yaml there), and cells of two cannot be "
                "compared.\nContinue with the same --base and --steps, or name another --out."
            )
        (self._out / "logs").mkdir(parents=True, exist_ok=True)
        kept.write_text(text, encoding="utf-8")

    def run(self, cells: Sequence[Cell]) -> None:
        """Make the cells that are not finished; one that fails is noted, and the others go on."""
        left = [cell for cell in cells if self.result(cell) is None]
        self._say(f"{len(cells)} cells, {len(cells) - len(left)} of them done before")
        started = time.monotonic()
        for number, cell in enumerate(left, start=1):
            begun = time.monotonic()
            why = self._make(cell)
            self._note(cell, why)
            now = time.monotonic()
            minutes = (now - started) / number * (len(left) - number) / 60
            self._say(
                f"[{len(cells) - len(left) + number}/{len(cells)}] {cell.name}: "
                f"{f'FAILED: {why}' if why else self._told(cell)}, {now - begun:.0f} s; "
                f"{len(left) - number} left, about {minutes:.0f} min"
            )

    def result(self, cell: Cell) -> CellResult | None:
        """What a cell found; None where it is not finished."""
        return read_cell(self._out / cell.name)

    def failures(self) -> dict[str, str]:
        """Cells that failed when they were last run, and why."""
        path = self._out / "failures.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def cells(self) -> list[Cell]:
        """All cells that the directory has, finished or not."""
        names = (CELL_NAME.fullmatch(path.name) for path in sorted(self._out.glob("*")))
        return [Cell(name[1], int(name[2]), int(name[3])) for name in names if name is not None]

    def tell(self, cells: Sequence[Cell]) -> str:
        """Write the tables of what is finished among `cells`; returns them. Raises ConfigError where nothing is."""
        results = {cell: result for cell in cells if (result := self.result(cell)) is not None}
        if not results:
            raise ConfigError(f"{self._out} has no finished cell yet; make some with `run --out {self._out}`")
        return write_study(self._out, results, [cell for cell in cells if cell not in results], self.failures())

    def draw(self, figure: Path, quantity: Quantity) -> None:
        """Draw what is finished."""
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw(figure, {cell: one for cell in self.cells() if (one := self.result(cell)) is not None}, quantity)

    def _make(self, cell: Cell) -> str:
        """Run a cell; returns why it failed, or nothing."""
        if cell.seed in self._broken_seeds:
            return "the warm start of its seed failed"
        warm = f"warm-seed{cell.seed}"
        if not (self._out / warm / "policy").is_dir():
            why = self._rlsys(warm, "sft", [f"seed={cell.seed}", "evaluation.before=false"])
            if why:
                self._broken_seeds.add(cell.seed)
                return f"the warm start of its seed failed: {why}"
        policy = (self._out / warm / "policy").resolve()
        return self._rlsys(
            cell.name,
            "train",
            [
                f"seed={cell.seed}",
                f"grpo.max_staleness={cell.staleness}",
                *CORRECTIONS[cell.correction],
                *("sft=null", "evaluation.before=false", "policy.kind=pretrained", f"policy.path={policy}"),
            ],
        )

    def _rlsys(self, name: str, command: str, overrides: Sequence[str]) -> str:
        """One run from its beginning; returns why it failed, or nothing."""
        shutil.rmtree(self._out / name, ignore_errors=True)  # of a run that was cut short: its times would be wrong
        log = self._out / "logs" / f"{name}.log"
        base = str(self._out / "base.yaml")
        code = self._execute([command, base, f"name={name}", *overrides, "--runs", str(self._out)], log)
        summary = read_summary(self._out / name)
        if code == 0 and summary is not None and summary["status"] == "finished":
            return ""
        return f"exit code {code}, see {log}"

    def _note(self, cell: Cell, why: str) -> None:
        failures = self.failures()
        failures.pop(cell.name, None)
        if why:
            failures[cell.name] = why
        (self._out / "failures.json").write_text(json.dumps(failures, indent=2) + "\n", encoding="utf-8")

    def _told(self, cell: Cell) -> str:
        result = self.result(cell)
        assert result is not None, "a cell without a failure is finished"
        return (
            f"accuracy {result.final_accuracy:.3f}, staleness {result.staleness:.2f}, GRPO {result.seconds:.0f} s, "
            f"{result.tokens / 1000:.0f}k tokens"
        )


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def say(text: str) -> None:
    """A line for who watches."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 where a cell failed, 2 where a user can mend what is wrong."""
    parsed = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # else the run of the present cell would go on without the study
    study = Study(parsed.out, run_rlsys, say)
    try:
        if parsed.command == "run":
            cells = plan(parsed.corrections, parsed.staleness, parsed.seeds)
            study.begin(parsed.base, [] if parsed.steps is None else [f"grpo.steps={parsed.steps}"])
            study.run(cells)
            say("\n" + study.tell(list(dict.fromkeys([*cells, *study.cells()]))))
        else:
            say(study.tell(study.cells()))
            study.draw(parsed.figure, Quantity(parsed.quantity))
            say(f"{parsed.figure} drawn")
    except RlsysError as error:
        sys.stderr.write(f"async_cost: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("async_cost: interrupted; the same command goes on\n")
        return 130
    return 1 if parsed.command == "run" and study.failures() else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.async_cost", description="Does asynchrony cost learning?"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the cells that are not finished; stop it and go on as you like")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4, 8], metavar="S")
    run.add_argument("--corrections", nargs="+", default=list(CORRECTIONS), choices=list(CORRECTIONS))
    run.add_argument("--steps", type=int, help="GRPO steps of a cell (default: those of the base configuration)")
    run.add_argument("--base", type=Path, default=BASE, help="configuration that all cells share (default %(default)s)")
    plot = commands.add_parser("plot", help="tables and a figure of what is finished")
    plot.add_argument("--figure", type=_picture, required=True, metavar="FILE", help="an .svg or .png file")
    plot.add_argument("--quantity", default=Quantity.REWARD.value, choices=[one.value for one in Quantity])
    for command in (run, plot):
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the runs are")
    return parser


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text}: name a file that ends in .svg or .png")
    return path


if __name__ == "__main__":
    sys.exit(main())
