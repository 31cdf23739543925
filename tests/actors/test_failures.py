"""What a run does when a role fails in its midst: it ends at once, with that role's own words, and leaves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from rlsys.errors import CheckpointError, RoleError
from tests.actors.controller_rig import Rig
from tests.rlsys.virtual_time import run_virtual, time_of_loop


def failing(call: str, version: int, error: Exception) -> Callable[[str, int], None]:
    def fails(called: str, at: int) -> None:
        if (called, at) == (call, version):
            raise error

    return fails


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize(("call", "error"), [
    ("load", CheckpointError("version 2 is damaged")), ("generate", RoleError("rollout worker 1: its process died")),
], ids=["load", "generate"])  # fmt: skip
def test_a_run_ends_at_once_with_the_error_of_the_worker_that_failed(call: str, error: Exception, bound: int) -> None:
    rig = Rig(time_of_loop(), bound=bound)
    for worker in rig.workers:
        worker.seconds = worker.load_seconds = 1.0
    rig.workers[1].fails = failing(call, 2, error)
    ended: list[float] = []

    async def train() -> None:
        try:
            await rig.train()
        finally:
            ended.append(asyncio.get_running_loop().time())
            assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing of the run goes on"

    with pytest.raises(ExceptionGroup) as caught:
        run_virtual(train())
    assert set(caught.value.exceptions) == {error}
    assert rig.learner.version <= 2 + bound + 1
    assert ended[0] < 20


def test_a_run_ends_at_once_with_the_error_of_its_evaluation() -> None:
    rig = Rig(time_of_loop(), every_versions=2, workers=1, steps=1000)
    rig.workers[0].seconds = 0.1
    error = RoleError("rollout worker 0: the engine refused it")
    generate = rig.workers[0].generate

    async def refuse(prompt: Any, *arguments: Any) -> Any:
        if int(prompt.problem_id.split("-")[1]) >= 100 and rig.workers[0].version == 4:
            raise error
        return await generate(prompt, *arguments)

    rig.workers[0].generate = refuse
    with pytest.raises(ExceptionGroup) as caught:
        run_virtual(rig.train())
    assert caught.value.subgroup(lambda one: one is error) is not None
    assert rig.evaluated == [0, 2]
    assert rig.learner.version <= 6


def test_stopping_never_hides_why_the_run_ended_and_reaches_every_worker() -> None:
    rig = Rig(time_of_loop())
    rig.workers[0].fails = failing("stop", 0, RoleError("rollout worker 0: its process died during stop"))
    run_virtual(rig.pool.stop())
    assert [worker.stopped for worker in rig.workers] == [False, True]
