"""What a person sees while a run is under way: plain lines, at most one every few seconds, each complete in itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TextIO

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Writes progress lines to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase_started = self._last_line = time.monotonic()
        self._first_step = 0

    def say(self, text: str) -> None:
        """Write one line now."""
        print(text, file=self._stream, flush=True)

    def begin(self, text: str, first_step: int = 0) -> None:
        """Announce a phase; the time left is estimated from its steps after `first_step`."""
        self.say(f"\n{text}")
        self._phase_started = self._last_line = time.monotonic()
        self._first_step = first_step

    def step(self, name: str, step: int, steps: int, facts: Mapping[str, str], remark: str = "") -> None:
        """Report a step: the last one, and others where the last line is some seconds old."""
        now = time.monotonic()
        if step != steps and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = (now - self._phase_started) / max(1, step - self._first_step) * (steps - step)
        parts = [
            f"{name} {step:>{len(str(steps))}}/{steps}",
            *(f"{key} {value}" for key, value in facts.items()),
            f"{clock(left)} left",
            *([remark] if remark else []),
        ]
        self.say("  " + "  ".join(parts))


def clock(seconds: float) -> str:
    """Minutes and seconds, as 2:05; hours in front from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: float) -> str:
    """A number with three digits and its thousands: 870, 4.1k, 2.35M."""
    for factor, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.0f}"
