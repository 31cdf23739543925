"""`rlsys evaluate`: a policy on the held-out problems of a configuration, without a learner."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from actors.cluster import Cluster
from actors.episodes import Episodes
from actors.evaluator import evaluate
from actors.progress import Progress
from actors.roles import Placement, demands, members
from actors.run import prepare
from rlsys.config import PretrainedPolicy
from rlsys.config_file import load_config
from rlsys.evaluation.accuracy import render_evaluation
from rlsys.pipeline.waits import WaitClock


async def evaluate_command(arguments: argparse.Namespace) -> int:
    """Prints the result; returns the exit code."""
    from rlsys.models.policy import check_policy

    config = load_config(Path(arguments.config), arguments.overrides)
    check_policy(arguments.policy)
    config = config.model_copy(update={"policy": PretrainedPolicy(kind="pretrained", path=str(arguments.policy))})
    progress = Progress(sys.stdout)
    needed = [one for one in demands(config) if one.role in ("rollout worker", "embedding service")]
    clock = WaitClock(time.monotonic, members(config))
    with tempfile.TemporaryDirectory() as models:
        prepared = prepare(config, Path(models), trains=False)
        async with Cluster(
            config.cluster,
            sum(one.processes * one.each.cpus for one in needed),
            sum(one.processes * one.each.gpus for one in needed),
            arguments.address,
        ) as cluster:
            with Placement(cluster, config, prepared.model_dir, prepared.encoder, progress.say) as placement:
                embedders = await placement.embedder_pool(clock)
                pool = await placement.rollout_pool(clock)
                try:
                    problems = prepared.task.splits["test"][: config.evaluation.problems]
                    evaluated = await evaluate(
                        Episodes(prepared.renderer, embedders, pool),
                        problems,
                        samples=config.evaluation.samples,
                        temperature=config.rollout.temperature,
                        max_new_tokens=config.rollout.max_new_tokens,
                        floor=prepared.task.floor(problems),
                        progress=lambda _: None,
                    )
                finally:
                    await pool.stop()
    progress.say(render_evaluation(evaluated.result))
    return 0
