"""What each part of the end-to-end benchmark answers with, and the probe for its memory.

A part runs in a process of its own and hands back one `Measured`; the memory is looked at from outside, so that the
looking does not slow down what is measured.
"""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.workload import TRAJECTORIES_PER_STEP

SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class Measured:
    """One part's figures over its measured steps (those of the warm-up are left out). None: it does not have that."""

    step_seconds: Sequence[float]
    generated_tokens: float | None = None
    """Over all measured steps, also what was not trained."""
    trained_tokens: float | None = None
    """Completion tokens in the loss."""
    completion_tokens_mean: float | None = None
    learner_idle: float | None = None
    """Part of the time, in [0, 1]."""
    rollout_idle: float | None = None
    bottleneck: str = ""
    staleness_mean: float | None = None
    staleness_max: float | None = None
    thrown_away_tokens: float | None = None
    """Generated, never trained, and no longer waiting to be."""
    peak_memory_mb: float | None = None
    """PSS of all its processes together."""
    details: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def seconds(self) -> float:
        """Of all measured steps."""
        return sum(self.step_seconds)

    @property
    def median_step(self) -> float:
        """Seconds."""
        return statistics.median(self.step_seconds)

    def per_second(self, amount: float | None) -> float | None:
        """An amount of all measured steps, per second."""
        return None if amount is None else amount / self.seconds

    def rates(self) -> dict[str, float | None]:
        """What follows from the rest, for readers of the JSON."""
        return {
            "step_seconds_median": self.median_step,
            "step_seconds_min": min(self.step_seconds),
            "step_seconds_max": max(self.step_seconds),
            "trajectories_per_second": self.per_second(len(self.step_seconds) * TRAJECTORIES_PER_STEP),
            "generated_tokens_per_second": self.per_second(self.generated_tokens),
            "trained_tokens_per_second": self.per_second(self.trained_tokens),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measured:
        """From `to_dict`."""
        return cls(**values)


class PeakMemory(threading.Thread):
    """Looks at the memory of a process and all its descendants until it is stopped.

    PSS counts a page that n processes share as 1/n in each, so that the sum is what the machine really holds (RSS would
    count libraries and Ray's object store once for each process).
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = pid
        self._stopped = threading.Event()
        self.peak_mb = 0.0

    def run(self) -> None:
        """Look every two seconds."""
        while not self._stopped.wait(SECONDS_BETWEEN_LOOKS):
            self.peak_mb = max(self.peak_mb, pss_mb(self._root))

    def stop(self) -> float:
        """The peak in MB."""
        self._stopped.set()
        self.join()
        return self.peak_mb


def pss_mb(pid: int) -> float:
    """Memory of a process and its descendants in MB; those that are gone meanwhile count as nothing."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(_pss_kb(one.pid) for one in family) / 1000


def _pss_kb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0.0
    return next((float(line.split()[1]) * 1.024 for line in lines if line.startswith("Pss:")), 0.0)


def two_cores() -> tuple[int, int]:
    """The first two that this process may use: the learner's, and that of everything else."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    return first, second


def pin(pid: int, core: int) -> None:
    """Put all threads of a process on one core; those that it starts later inherit it."""
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, {core})
