"""Ray: the one module that imports it, reads the environment, and knows where things run.

A role is an ordinary class. `Cluster.place` makes a Ray actor of it and returns an `ActorProxy`, whose methods are
coroutines with a deadline. Whatever goes wrong in a call comes out as the role's own RlsysError, or as a RoleError
that names the role, the call and how long it waited: a RoleLostError where nothing more is to be had of that process.

One invariant: when `Cluster.__aexit__` has returned, no process that it started is left.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray would otherwise warn, on every start without GPUs, about a change of its own in a later version.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# The driver never computes with DeepSpeed, which peft imports there: without this it would look for accelerators.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import psutil
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.metrics import Gauge

from rlsys.config import ClusterConfig
from rlsys.errors import RlsysError, RoleError, RoleLostError
from rlsys.pipeline.waits import within


@dataclass(frozen=True)
class Resources:
    """What one process of a role needs."""

    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """Threads for numerics: whole cores, at least one."""
        return max(1, int(self.cpus))


CPU_ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""For a process with an engine on a CPU: one engine process instead of two, and threads that don't spin for work."""


def prepare_engine_process() -> None:
    """Make this very process one that starts an engine on a CPU."""
    os.environ.update(CPU_ENGINE_ENVIRONMENT)


def shared_memory_directory() -> Path:
    """A new directory in this host's shared memory, for weights on their way from the learner to the engines.

    Its name holds this process's number: directories of processes that are gone (killed runs) are removed here.
    """
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    for stale in memory.glob("rlsys-weights-*"):
        if not psutil.pid_exists(int(stale.name.split("-")[2])):
            shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"rlsys-weights-{os.getpid()}-", dir=memory))


def _check_answers(address: str) -> None:
    """Raise RoleError where nothing listens at `host:port`: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return  # `auto`, which Ray looks up on this machine
    if not port.isdigit():
        raise RoleError(f"--address {address}: write it as host:port, or auto for a cluster on this machine")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise RoleError(
            f"no Ray cluster answers at {address!r}: {error.strerror or error}. Start one with `ray start "
            "--head` or `ray up cluster.yaml`, or leave --address out for a local one"
        ) from error


class ActorProxy:
    """A Ray actor whose methods are coroutines: `await proxy.method(x)` is `await handle.method.remote(x)`."""

    def __init__(self, handle: Any, role: str, timeout_seconds: float, by_reference: Collection[str]) -> None:
        self._handle = handle
        self._role = role
        self._timeout_seconds = timeout_seconds
        self._by_reference = by_reference

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self._handle, name)

        async def call(*args: object) -> Any:
            # Arguments that are references themselves are resolved by Ray, on the actor's node.
            if name in self._by_reference:
                first, rest = method.options(num_returns=2).remote(*args)
                return first, await self._wait(rest, name)
            return await self._wait(method.remote(*args), name)

        return call

    async def _wait(self, reference: Any, method: str) -> Any:
        started = time.monotonic()
        try:
            return await asyncio.wait_for(reference, self._timeout_seconds)
        except asyncio.CancelledError:
            # Nobody waits for the answer any more: an async role stops working on it.
            ray.cancel(reference)
            raise
        except (TimeoutError, GetTimeoutError) as error:
            raise RoleLostError(
                f"{self._role}: {method} did not answer within {self._timeout_seconds:.0f} s "
                "(cluster.call_timeout_seconds); it hangs, or the deadline is too short"
            ) from error
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            if isinstance(cause, RlsysError):
                raise cause from None
            raise RoleError(f"{self._role}: {method} failed with {type(cause).__name__}: {cause}\n{error}") from error
        except RayActorError as error:
            seconds = time.monotonic() - started
            raise RoleLostError(
                f"{self._role}: its process died during {method} after {seconds:.1f} s: {str(error).splitlines()[0]}"
            ) from error
        except RayError as error:  # an object or a node was lost, a process could not be placed, memory ran out, ...
            raise RoleError(f"{self._role}: {method} failed with {type(error).__name__}: {error}") from error

    def _kill(self) -> None:
        ray.kill(self._handle)


class Cluster:
    """A Ray cluster for one run: a local one that ends with it, or a share of one that runs already."""

    def __init__(self, config: ClusterConfig, needed_cpus: float, needed_gpus: float, address: str | None) -> None:
        self._config = config
        self._needed_cpus = needed_cpus
        self._needed_gpus = needed_gpus
        self._address = address
        self._proxies: list[ActorProxy] = []
        self._gauges: dict[str, Gauge] = {}
        self.dashboard_url: str | None = None
        self.log_directory = ""
        """Where Ray keeps what every process printed."""

    async def __aenter__(self) -> Cluster:
        await within(
            self._config.start_timeout_seconds,
            asyncio.to_thread(self._start),
            role=f"Ray {f'at {self._address}' if self._address else 'on this machine'}",
            call="start (cluster.start_timeout_seconds)",
        )
        # Ray takes SIGTERM for itself in ray.init; from here on it ends the run as Ctrl-C does.
        task = asyncio.current_task()
        assert task is not None, "a cluster is entered by a task"
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for proxy in self._proxies:
            proxy._kill()  # pyright: ignore[reportPrivateUsage] (its maker)
        self._proxies.clear()
        ray.shutdown()

    def _start(self) -> None:
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": f"rlsys-{os.getpid()}"}
        if self._address is not None:
            _check_answers(self._address)
            # A cluster asks for the user's token if it was started where there was one; Ray itself sends it only to
            # clusters that it finds, not to one named by its address.
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            try:
                context: Any = ray.init(address=self._address, **common)
            except ConnectionError as error:
                raise RoleError(
                    f"no Ray cluster answers at {self._address!r}: {error}. Start one with `ray start --head` "
                    "or `ray up cluster.yaml`, or leave --address out for a local one"
                ) from error
            self._check_capacity()
        else:
            context = ray.init(
                address="local",  # else Ray would join a cluster that happens to run on this machine
                num_cpus=max(math.ceil(self._needed_cpus), os.cpu_count() or 1),
                include_dashboard=self._config.dashboard,
                dashboard_host="127.0.0.1",
                **common,
            )
            if self._needed_gpus:
                self._check_capacity()
        self.dashboard_url = f"http://{context.dashboard_url}" if context.dashboard_url else None
        self.log_directory = f"{context.address_info['session_dir']}/logs"

    def _check_capacity(self) -> None:
        """Raise instead of waiting for ever for resources that the cluster does not have."""
        have: dict[str, Any] = ray.cluster_resources()
        for name, needed in (("CPU", self._needed_cpus), ("GPU", self._needed_gpus)):
            if needed > have.get(name, 0.0):
                raise RoleError(
                    f"the run needs {needed:g} {name}s and the cluster has {have.get(name, 0.0):g}; "
                    f"lower the roles' {name.lower()}s in the configuration or add nodes"
                )

    async def place(
        self,
        role: str,
        make: type,
        *args: object,
        resources: Resources,
        environment: Mapping[str, str] | None = None,
        concurrency: int | None = None,
        by_reference: Collection[str] = (),
    ) -> Any:
        """Start one actor of class `make(*args)` and wait until it is constructed.

        `role` names it in messages and on the dashboard. `concurrency` is the number of calls that an async class
        takes at once. Methods in `by_reference` return two values, of which the first stays a reference.
        """
        variables = {
            "OMP_NUM_THREADS": str(resources.threads),
            "TOKENIZERS_PARALLELISM": "false",
            **(environment or {}),
        }
        options: dict[str, Any] = {
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "name": role,
            "max_restarts": 0,
            "runtime_env": {"env_vars": variables},
        }
        if concurrency is not None:
            options["max_concurrency"] = concurrency
        handle = ray.remote(make).options(**options).remote(*args)
        proxy = ActorProxy(handle, role, self._config.call_timeout_seconds, by_reference)
        self._proxies.append(proxy)
        starting = ActorProxy(handle, role, self._config.start_timeout_seconds, ())
        try:
            await starting._wait(handle.__ray_ready__.remote(), "start")  # pyright: ignore[reportPrivateUsage]
        except RoleError:
            self.kill(proxy)
            raise
        return proxy

    def export_metrics(self, metrics: Mapping[str, float]) -> None:
        """Show values on the Ray dashboard and to Prometheus: `train/loss` is `ray_rlsys_train_loss` there."""
        for name, value in metrics.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"rlsys_{name.replace('/', '_')}", description=f"rlsys metric {name}")
            self._gauges[name].set(value)

    async def node_of(self, proxy: ActorProxy) -> str:
        """The id of the node on which an actor runs."""
        asked = proxy._handle.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())  # pyright: ignore[reportPrivateUsage]
        return await proxy._wait(asked, "node_of")  # pyright: ignore[reportPrivateUsage] (its maker)

    def kill(self, proxy: ActorProxy) -> None:
        """End one actor at once, whatever it is doing."""
        self._proxies.remove(proxy)
        proxy._kill()  # pyright: ignore[reportPrivateUsage] (its maker)
