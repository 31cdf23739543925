"""Rollout workers that die or hang: the run goes on with the others and one in their place, and keeps its bound."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from actors.ports import Sampling
from rlsys.errors import RoleLostError
from rlsys.models.weights import WeightFile
from rlsys.pipeline.waits import Role
from tests.actors.controller_rig import START_SECONDS, Rig
from tests.fakes import FakeRenderer, FakeWorker, problem
from tests.rlsys.virtual_time import run_virtual, time_of_loop

STEPS = 12
DEAD = RoleLostError("rollout worker: its process died")


def dies(call: str, version: int) -> Callable[[str, int], None]:
    """From that call at that version on, a worker does nothing any more."""
    dead = False

    def fails(called: str, at: int) -> None:
        nonlocal dead
        dead = dead or (called == call and at >= version)
        if dead:
            raise DEAD

    return fails


def make_rig(bound: int = 1, workers: int = 2, replacements: int = 3) -> Rig:
    rig = Rig(time_of_loop(), bound=bound, steps=STEPS, workers=workers, replacements=replacements)
    rig.learner.seconds = 1.5
    rig.prepare = take_time
    for worker in rig.workers:
        take_time(worker)
    return rig


def take_time(worker: FakeWorker) -> None:
    worker.seconds, worker.load_seconds = 1.0, 0.1


def assert_whole(rig: Rig, bound: int) -> None:
    """Every step was made, of groups that were trained once and are no staler than the bound."""
    assert len(rig.records) == STEPS
    tickets = [group.ticket for groups in rig.trained for group in groups]
    assert sorted(tickets) == list(range(3 * STEPS))
    staleness = [record.metrics["staleness/max"] for record in rig.records]
    assert max(staleness) <= bound
    rig.buffer.ledger.check()


@pytest.mark.parametrize("call", ["generate", "load"])
@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_goes_on_without_a_lost_worker_and_then_with_another(call: str, bound: int, workers: int) -> None:
    rig = make_rig(bound, workers)
    rig.workers[0].fails = dies(call, 3)
    run_virtual(rig.train())
    assert_whole(rig, bound)
    replacement = rig.workers[workers]
    assert replacement.prompts_written > 0
    # It joins with the version that is live, and takes each one after it.
    assert replacement.loaded == list(range(replacement.loaded[0], STEPS + 1))
    assert rig.said[0].startswith("  LOST rollout worker: its process died")
    assert "has taken its place" in rig.said[1]


def test_nothing_is_served_by_a_worker_that_has_not_the_others_version() -> None:
    rig = make_rig(bound=1)
    rig.workers[0].fails = dies("generate", 3)
    served: list[int] = []

    def prepare(worker: FakeWorker) -> None:
        take_time(worker)
        worker.fails = lambda call, version: served.append(version) if call == "generate" else None

    rig.prepare = prepare
    run_virtual(rig.train())
    assert served
    assert min(served) > 3


def test_a_run_goes_on_with_fewer_when_no_more_are_replaced() -> None:
    rig = make_rig(workers=2, replacements=0)
    rig.workers[0].fails = dies("generate", 3)
    run_virtual(rig.train())
    assert_whole(rig, 1)
    assert len(rig.workers) == 2
    assert "1 rollout workers go on" in rig.said[0]


@pytest.mark.parametrize("replacements", [0, 1, 2])
def test_a_run_ends_with_the_error_of_the_last_worker_when_all_are_lost(replacements: int) -> None:
    rig = make_rig(workers=1, replacements=replacements)
    rig.workers[0].fails = dies("generate", 3)
    rig.prepare = lambda worker: setattr(worker, "fails", dies("generate", 0))
    with pytest.raises(ExceptionGroup) as caught:
        run_virtual(rig.train())
    assert set(caught.value.exceptions) == {DEAD}
    assert len(rig.workers) == 1 + replacements


def test_a_replacement_that_cannot_be_made_leaves_the_others_at_work() -> None:
    rig = make_rig(workers=2, replacements=2)
    rig.workers[0].fails = dies("generate", 3)
    rig.prepare = lambda worker: setattr(worker, "fails", dies("load", 0))
    run_virtual(rig.train())
    assert_whole(rig, 1)
    assert [line for line in rig.said if "could not take its place" in line] == rig.said[1:]
    assert len(rig.said) == 1 + 2
    assert rig.ended == [rig.workers[0], rig.workers[2]]


def test_a_worker_that_is_lost_while_a_load_is_about_to_begin_is_left_out_of_it() -> None:
    rig = make_rig(workers=2, replacements=0)
    prompt = FakeRenderer().render(problem())

    async def die(*_: object) -> Any:
        raise DEAD

    rig.workers[0].generate = die

    async def load_and_lose() -> None:
        load = asyncio.create_task(rig.pool.load(WeightFile("nowhere", 1, "", 0)))
        generate = asyncio.create_task(rig.pool.generate(prompt, Sampling(1, 1.0, 8), {}))  # its turn comes in between
        await asyncio.gather(load, generate)

    run_virtual(load_and_lose())
    assert [worker.loaded for worker in rig.workers] == [[], [1]]


def test_stopping_does_not_wait_for_a_replacement() -> None:
    rig = make_rig(workers=2)
    rig.workers[0].fails = dies("load", 1)

    async def lose_and_stop() -> float:
        await rig.pool.load(WeightFile("nowhere", 1, "", 0))
        started = asyncio.get_running_loop().time()
        await rig.pool.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return asyncio.get_running_loop().time() - started

    assert run_virtual(lose_and_stop()) < START_SECONDS
    assert rig.workers[1].stopped


def test_the_time_of_a_lost_worker_is_nobodys() -> None:
    rig = make_rig(workers=2)
    rig.workers[0].fails = dies("generate", 3)
    run_virtual(rig.train())
    assert rig.waits is not None
    seconds = {role: rig.waits.member_seconds[role] for role in Role}
    missing = 2 * seconds[Role.LEARNER] - seconds[Role.ROLLOUT_WORKER]
    assert missing == pytest.approx(START_SECONDS + 0.1)  # from its loss until another has started and loaded
    assert rig.waits.fractions(Role.ROLLOUT_WORKER)["idle"] == pytest.approx(0, abs=1e-9)


def test_whichever_workers_die_at_whatever_moment_nothing_is_lost_but_time() -> None:
    losses = [losses_of(seed) for seed in range(40)]
    assert sum(losses) > 100
    assert max(losses) > 10


def losses_of(seed: int) -> int:
    """How many workers were lost, of a run whose workers die at random."""
    chance = random.Random(seed)
    bound = chance.choice([0, 1, 2, 4])
    rig = make_rig(bound, workers=chance.choice([1, 2, 4]), replacements=1000)

    def fragile(worker: FakeWorker) -> None:
        worker.seconds, worker.load_seconds = chance.uniform(0.1, 3), chance.choice([0.0, 0.1, 2.0])
        dead = False

        def fails(call: str, version: int) -> None:
            nonlocal dead
            dead = dead or chance.random() < 0.1
            if dead:
                raise DEAD

        worker.fails = fails

    rig.prepare = fragile
    for worker in rig.workers:
        fragile(worker)
    run_virtual(rig.train())
    assert_whole(rig, bound)
    return sum("LOST" in line for line in rig.said)
