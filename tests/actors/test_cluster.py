"""Ray behind its one module: what calls, errors, references and deadlines look like from outside."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from actors.cluster import ActorProxy, Cluster, Resources, shared_memory_directory
from rlsys.config import ClusterConfig
from rlsys.errors import DataError, RoleError

SMALL = Resources(cpus=0.1, gpus=0)


class Worker:
    """Does what the tests ask."""

    def twice(self, number: int) -> int:
        return 2 * number

    def refuse(self) -> None:
        raise DataError("row 7 is bad; mend it")

    def stumble(self) -> None:
        raise KeyError("missing")

    def die(self) -> None:
        os._exit(1)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def total(self, features: dict[str, Any]) -> float:
        return float(features["a"].sum())


class Service:
    """Async, and answers with a value that stays in the object store."""

    def __init__(self) -> None:
        self.cancelled = False

    async def embed(self, number: int) -> tuple[dict[str, Any], str]:
        return {"a": np.full(1000, number)}, "report"

    async def wait(self) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def was_cancelled(self) -> bool:
        return self.cancelled


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def cluster(runner: asyncio.Runner) -> Iterator[Cluster]:
    made = Cluster(ClusterConfig(dashboard=False, call_timeout_seconds=3), 1, 0, None)
    runner.run(made.__aenter__())
    yield made
    runner.run(made.__aexit__(None, None, None))


def test_an_actor_answers_like_the_object_itself(runner: asyncio.Runner, cluster: Cluster) -> None:
    async def ask() -> int:
        worker = await cluster.place("worker", Worker, resources=SMALL)
        return await worker.twice(21)

    assert runner.run(ask()) == 42


def test_a_users_error_arrives_as_it_was_raised(runner: asyncio.Runner, cluster: Cluster) -> None:
    async def ask() -> None:
        await (await cluster.place("refuser", Worker, resources=SMALL)).refuse()

    with pytest.raises(DataError, match="row 7 is bad; mend it"):
        runner.run(ask())


def test_any_other_error_names_the_role_and_the_call(runner: asyncio.Runner, cluster: Cluster) -> None:
    async def ask() -> None:
        await (await cluster.place("stumbler", Worker, resources=SMALL)).stumble()

    with pytest.raises(RoleError, match=r"stumbler: stumble failed with KeyError: 'missing'"):
        runner.run(ask())


def test_a_dead_process_names_the_role_and_the_call(runner: asyncio.Runner, cluster: Cluster) -> None:
    async def ask() -> None:
        await (await cluster.place("mortal", Worker, resources=SMALL)).die()

    with pytest.raises(RoleError, match="mortal: its process died during die"):
        runner.run(ask())


def test_a_call_that_hangs_ends_at_its_deadline(runner: asyncio.Runner, cluster: Cluster) -> None:
    async def ask() -> None:
        await (await cluster.place("sleeper", Worker, resources=SMALL)).sleep(30)

    with pytest.raises(RoleError, match=r"sleeper: sleep did not answer within 3 s \(cluster.call_timeout_seconds\)"):
        runner.run(ask())


def test_features_go_from_service_to_worker_without_the_driver(runner: asyncio.Runner, cluster: Cluster) -> None:
    async def ask() -> tuple[Any, str, float]:
        service = await cluster.place("service", Service, resources=SMALL, concurrency=10, by_reference=("embed",))
        worker = await cluster.place("summer", Worker, resources=SMALL)
        reference, report = await service.embed(3)
        return reference, report, await worker.total(reference)

    reference, report, total = runner.run(ask())
    assert isinstance(reference, ray.ObjectRef)
    assert (report, total) == ("report", 3000.0)


def test_what_nobody_waits_for_any_more_is_stopped(runner: asyncio.Runner, cluster: Cluster) -> None:
    async def ask() -> bool:
        service = await cluster.place("patient", Service, resources=SMALL, concurrency=10)
        waiting = asyncio.ensure_future(service.wait())
        await asyncio.sleep(0.5)
        waiting.cancel()
        for _ in range(50):
            await asyncio.sleep(0.1)
            if await service.was_cancelled():
                return True
        return False

    assert runner.run(ask())


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.OwnerDiedError("0" * 56, None, "its owner has died"),
        ray.exceptions.OutOfMemoryError("the host has no memory left"),
        ray.exceptions.ActorUnschedulableError("no node has room"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_else_ray_raises_names_the_role_and_the_call(error: Exception) -> None:
    async def lose() -> None:
        raise error

    proxy = ActorProxy(None, "learner 0", 5.0, ())
    with pytest.raises(RoleError, match=f"^learner 0: accumulate failed with {type(error).__name__}: "):
        asyncio.run(proxy._wait(lose(), "accumulate"))  # pyright: ignore[reportPrivateUsage]


def test_metrics_reach_prometheus_under_their_names(runner: asyncio.Runner, cluster: Cluster) -> None:
    cluster.export_metrics({"train/loss": 0.25, "staleness/max": 1})
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline = time.monotonic() + 40
    text = ""
    while "ray_rlsys_train_loss{" not in text and time.monotonic() < deadline:
        time.sleep(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    (line,) = [one for one in text.splitlines() if one.startswith("ray_rlsys_train_loss{")]
    assert line.endswith(" 0.25")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (
            "127.0.0.1:1",
            r"no Ray cluster answers at '127.0.0.1:1': Connection refused. Start one with `ray start --head`",
        ),
        ("head:port", "--address head:port: write it as host:port"),
    ],
)
def test_an_address_where_nothing_answers_is_told_at_once(address: str, told: str) -> None:
    with pytest.raises(RoleError, match=told):
        asyncio.run(Cluster(ClusterConfig(), 1, 0, address).__aenter__())


def test_weights_of_runs_that_are_gone_are_removed_from_shared_memory() -> None:
    first = shared_memory_directory()
    gone = first.with_name("rlsys-weights-4194303-x")  # above Linux's largest process number
    gone.mkdir(exist_ok=True)
    second = shared_memory_directory()
    assert (first.exists(), gone.exists(), second.exists()) == (True, False, True)
    first.rmdir()
    second.rmdir()
