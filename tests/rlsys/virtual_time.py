"""An asyncio event loop whose clock jumps to the next timer: hours of waiting take milliseconds, a deadlock is seen.

Where no task can run and no timer is set, a real loop would sleep for ever; this one raises `Deadlock`. So it does
where only timers go on for longer than any test takes, and where tasks run for ever without time passing.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

HORIZON_SECONDS = 1e5
TURNS_AT_ONE_TIME = 100_000


class Deadlock(AssertionError):  # noqa: N818
    """All tasks wait, and nothing will wake them; or they move, and nothing comes of it."""


class _JumpingSelector(selectors.SelectSelector):
    now = 0.0
    turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("every task waits and no timer is set")
        if timeout > 0:
            self.turns = 0
            self.now += timeout
            if self.now > HORIZON_SECONDS:
                raise Deadlock(f"the run did not end within {HORIZON_SECONDS:.0f} s")
        self.turns += 1
        if self.turns > TURNS_AT_ONE_TIME:
            self.turns = 0
            raise Deadlock(f"time stands still at {self.now:.1f} s")
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`loop.time()` starts at 0 and moves only when nothing else is left to do."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def time_of_loop() -> Callable[[], float]:
    """A clock that reads the first loop in which it is asked; outside of it, it stands still."""
    own: asyncio.AbstractEventLoop | None = None
    last = 0.0

    def now() -> float:
        nonlocal own, last
        with suppress(RuntimeError):
            running = asyncio.get_running_loop()
            own = own or running
            last = own.time() if running is own else last
        return last

    return now


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end under virtual time; tasks that it leaves behind are cancelled."""
    loop = VirtualTimeLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
            for task in left:
                if not task.cancelled():
                    task.exception()
        loop.close()
