"""Joining a cluster that runs already, with and without a token in the user's home directory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

JOIN = """
import asyncio, sys
import ray  # before the module under test, as a user's own code may do
from actors.cluster import Cluster, Resources
from rlsys.config import ClusterConfig

class Worker:
    def twice(self, number):
        return 2 * number

async def main():
    async with Cluster(ClusterConfig(dashboard=False), 1, 0, sys.argv[1]) as cluster:
        worker = await cluster.place("worker", Worker, resources=Resources(cpus=0.1, gpus=0))
        print("answer", await worker.twice(21))

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("token", [False, True])
def test_a_driver_joins_a_running_cluster(tmp_path: Path, token: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["HOME"] = str(tmp_path)
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = str(Path(sys.executable).parent / "ray")
    head = [ray, "start", "--head", "--block", f"--port={port}", "--include-dashboard=false", "--num-cpus=1"]
    process = subprocess.Popen(
        [*head, "--node-ip-address=127.0.0.1"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ray runtime started" in line:
                break
        joined = subprocess.run(
            [sys.executable, "-c", JOIN, f"127.0.0.1:{port}"],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "answer 42" in joined.stdout, joined.stdout + joined.stderr
    finally:
        process.terminate()
        process.wait(30)
