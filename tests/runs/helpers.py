"""Runs the command as a person does, in a process of its own, and looks at what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

TINY = Path(__file__).with_name("tiny.yaml")
COMMAND = [sys.executable, "-m", "actors.cli"]


def rlsys(*arguments: str, timeout: float = 300, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `rlsys` to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout, check=False, input=stdin
    )


class BackgroundRun:
    """A run that is interrupted. Use as a context: whatever fails, nothing of it is left."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self._log = log.open("w")
        self.log = log
        self.process = subprocess.Popen([*COMMAND, *arguments], stdout=self._log, stderr=subprocess.STDOUT)
        self._family: list[psutil.Process] = []

    def __enter__(self) -> BackgroundRun:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.remember(), psutil.Process()] if self.process.poll() is None else self._family:
            if process.pid != os.getpid() and process.is_running():
                process.kill()
        self._log.close()

    def wait_for_step(self, run: Path, step: int, seconds: float = 400) -> None:
        """Wait until `metrics.jsonl` has a GRPO step."""
        deadline = time.monotonic() + seconds
        while not any(line["phase"] == "grpo" and line["step"] >= step for line in metrics(run)):
            assert self.process.poll() is None, f"the run ended early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no step {step} within {seconds} s:\n{self.log.read_text()}"
            time.sleep(0.2)

    def wait_for_output(self, text: str, seconds: float = 400, times: int = 1) -> None:
        """Wait until the run has printed something so many times."""
        deadline = time.monotonic() + seconds
        while self.log.read_text().count(text) < times:
            assert self.process.poll() is None, f"the run ended early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {text!r} within {seconds} s:\n{self.log.read_text()}"
            time.sleep(0.2)

    def wait_for_end(self, seconds: float = 400) -> int:
        """Wait for the run's own end; returns its exit code."""
        self.remember()
        return self.process.wait(seconds)

    def end_by(self, number: signal.Signals) -> int:
        """Send a signal to the driver alone; returns its exit code."""
        self.remember()
        self.process.send_signal(number)
        return self.process.wait(60)

    def survivors(self, seconds: float = 20, but: str = "") -> list[str]:
        """Processes of the run that are still there after `seconds` at most; those named like `but` are not counted."""
        deadline = time.monotonic() + seconds
        while (alive := self._alive(but)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return alive

    def _alive(self, but: str) -> list[str]:
        lines = [f"{one.pid} {' '.join(one.cmdline()).strip()}" for one in self._family if _is_alive(one)]
        return [line for line in lines if not but or but not in line]

    def remember(self) -> list[psutil.Process]:
        """Note the processes that the run has now, to look for them later."""
        driver = psutil.Process(self.process.pid)
        self._family = [driver, *driver.children(recursive=True)]
        return self._family


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` so far."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def summary(run: Path) -> dict[str, Any]:
    """`summary.json`."""
    return json.loads((run / "summary.json").read_text())


def steps(run: Path, phase: str) -> Sequence[int]:
    """The steps of a phase, as they stand in `metrics.jsonl`."""
    return [line["step"] for line in metrics(run) if line["phase"] == phase]
