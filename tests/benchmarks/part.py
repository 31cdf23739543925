"""One part of the end-to-end benchmark, in this process: `python -m tests.benchmarks.part NAME --work DIR --out FILE`.

Started by `tests.benchmarks.end_to_end`, with the environment that the part asks for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.benchmarks import alone, ours, trl_runs
from tests.benchmarks.measured import Measured


@dataclass(frozen=True)
class Part:
    """How a part is run."""

    run: Callable[[Path, int, int], Measured]
    """From the work directory, steps and warm-up steps to the figures."""
    environment: Mapping[str, str]
    by_default: bool = True


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TWO_THREADS = {"OMP_NUM_THREADS": "2"}
LEARNER = {"DS_ACCELERATOR": "cpu"}

PARTS: Mapping[str, Part] = {
    "rollout-alone": Part(alone.run_rollout_alone, ours.ENVIRONMENT | ONE_THREAD),
    "learner-alone": Part(alone.run_learner_alone, ours.ENVIRONMENT | ONE_THREAD | LEARNER),
    "rlsys-s1": Part(partial(ours.run_system, staleness=1, streaming=False), ours.ENVIRONMENT),
    "rlsys-s1-streaming": Part(partial(ours.run_system, staleness=1, streaming=True), ours.ENVIRONMENT),
    "rlsys-s0": Part(partial(ours.run_system, staleness=0, streaming=False), ours.ENVIRONMENT),
    "rlsys-s0-streaming": Part(partial(ours.run_system, staleness=0, streaming=True), ours.ENVIRONMENT),
    "trl-async": Part(trl_runs.run_asynchronous, trl_runs.ENVIRONMENT | ONE_THREAD),
    "trl-vllm": Part(partial(trl_runs.run_synchronous, engine="vllm"), trl_runs.ENVIRONMENT | TWO_THREADS),
    "trl-transformers": Part(
        partial(trl_runs.run_synchronous, engine="transformers"), trl_runs.ENVIRONMENT | TWO_THREADS, by_default=False
    ),
}


def main() -> None:
    """Run the part and write its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    arguments = parser.parse_args()
    measured = PARTS[arguments.name].run(arguments.work, arguments.steps, arguments.warmup)
    arguments.out.write_text(json.dumps(measured.to_dict()))
    sys.stdout.flush()
    # Threads that TRL, vLLM and DeepSpeed leave behind would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
