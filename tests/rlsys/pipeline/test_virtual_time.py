"""A simulated run that cannot go on fails; it never hangs."""

import asyncio

import pytest

from tests.rlsys.virtual_time import Deadlock, run_virtual


def test_hours_pass_at_once() -> None:
    async def run() -> float:
        await asyncio.sleep(7200)
        return asyncio.get_running_loop().time()

    assert run_virtual(run()) == pytest.approx(7200)


def test_waiting_for_what_nobody_sends_is_a_deadlock() -> None:
    with pytest.raises(Deadlock, match="no timer is set"):
        run_virtual(asyncio.Event().wait())


def test_waiting_while_only_a_timer_goes_on_is_a_deadlock() -> None:
    async def tick() -> None:
        while True:
            await asyncio.sleep(1000)

    async def run() -> None:
        ticking = asyncio.create_task(tick())
        await asyncio.Event().wait()
        ticking.cancel()

    with pytest.raises(Deadlock, match="did not end within 100000 s"):
        run_virtual(run())


def test_turning_without_time_passing_is_a_deadlock() -> None:
    async def run() -> None:
        await asyncio.sleep(5)
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Deadlock, match=r"time stands still at 5\.0 s"):
        run_virtual(run())
