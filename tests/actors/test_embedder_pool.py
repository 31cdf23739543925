"""The embedding service's replicas as one: who is asked for what, and when a replica counts as busy."""

from __future__ import annotations

import asyncio

from actors.embedder_pool import EmbedderPool
from rlsys.pipeline.waits import Role, WaitClock
from tests.fakes import FakeEmbedder, FakeRenderer, problem
from tests.rlsys.virtual_time import run_virtual, time_of_loop

PROBLEMS = [problem(number) for number in range(8)]
RENDERER = FakeRenderer()


def make_pool(replicas: int, seconds: float = 0.0) -> tuple[EmbedderPool, list[FakeEmbedder], WaitClock]:
    embedders = [FakeEmbedder() for _ in range(replicas)]
    for embedder in embedders:
        embedder.seconds = seconds
    clock = WaitClock(time_of_loop(), {Role.EMBEDDING_SERVICE: replicas})
    return EmbedderPool(embedders, clock), embedders, clock


def test_a_problem_has_its_replica_whether_it_is_asked_for_alone_or_with_others() -> None:
    alone, alone_embedders, _ = make_pool(3)
    together, together_embedders, _ = make_pool(3)

    async def ask() -> int:
        for one in PROBLEMS:
            await alone.embed(RENDERER.render(one), one)
        bundles = await together.embed_many([(RENDERER.render(one), one) for one in PROBLEMS])
        return sum(len(bundle) for bundle in bundles)

    assert run_virtual(ask()) == 2 * len(PROBLEMS)
    assert [one.asked for one in alone_embedders] == [one.asked for one in together_embedders]
    assert all(one.asked for one in alone_embedders)


def test_a_replica_is_busy_from_its_first_request_to_the_end_of_its_last() -> None:
    pool, _, clock = make_pool(1, seconds=2.0)

    async def ask() -> None:
        async def later(number: int, delay: float) -> None:
            await asyncio.sleep(delay)
            await pool.embed(RENDERER.render(PROBLEMS[number]), PROBLEMS[number])

        await asyncio.gather(later(0, 0.0), later(1, 1.0), later(2, 10.0))

    run_virtual(ask())
    times = clock.totals()
    assert times.busy_seconds[Role.EMBEDDING_SERVICE] == 3 + 2
    assert times.member_seconds[Role.EMBEDDING_SERVICE] == 12
