"""The two heavy roles of rlsys each alone on a core: no pipeline can make a step faster than the slower of them."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.types import (
    Completion,
    FinishReason,
    PartScore,
    PartStatus,
    Problem,
    Score,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
)
from tests.benchmarks.measured import Measured, two_cores
from tests.benchmarks.ours import configuration
from tests.benchmarks.workload import (
    END_IDS,
    FIRST_WORD_ID,
    GROUP_SIZE,
    LEARNING_RATE,
    MAX_NEW_TOKENS,
    PROMPTS_PER_STEP,
    TRAJECTORIES_PER_STEP,
    VOCABULARY,
    WordRenderer,
    problems,
)


def run_rollout_alone(work: Path, steps: int, warmup: int) -> Measured:
    """The rollout worker on one core, always with spare groups queued; a step is 16 finished groups."""
    os.sched_setaffinity(0, {two_cores()[1]})
    ends, lengths = asyncio.run(_generate(work, PROMPTS_PER_STEP * (steps + warmup)))
    marks = ends[PROMPTS_PER_STEP * warmup - 1 :: PROMPTS_PER_STEP]
    measured = lengths[PROMPTS_PER_STEP * warmup :]
    return Measured(
        step_seconds=[later - earlier for earlier, later in itertools.pairwise(marks)],
        generated_tokens=sum(measured),
        completion_tokens_mean=sum(measured) / len(measured) / GROUP_SIZE,
    )


async def _generate(work: Path, groups: int) -> tuple[list[float], list[int]]:
    """When each group was finished, and how many tokens it has."""
    from actors.cluster import prepare_engine_process
    from actors.models import encoder_factory, policy_directory
    from actors.ports import Sampling
    from actors.rollout_worker import RolloutWorker
    from rlsys.models.vllm_plugin.options import EngineOptions

    prepare_engine_process()
    config = configuration(work, groups)
    model = policy_directory(config, work / "models", encoder_factory(config, work / "models"), texts=())
    assert config.rollout.kv_cache_gb is not None, "engines on a CPU are told their memory"
    worker = RolloutWorker(
        EngineOptions(
            model_dir=str(model),
            max_model_len=config.rollout.max_model_tokens,
            max_num_seqs=config.rollout.max_running,
            kv_cache_bytes=int(config.rollout.kv_cache_gb * 2**30),
        )
    )
    await worker.start()
    renderer, ends, lengths = WordRenderer(), list[float](), list[int]()
    sampling = Sampling(GROUP_SIZE, config.rollout.temperature, MAX_NEW_TOKENS)
    queued = asyncio.Semaphore(2 * PROMPTS_PER_STEP)

    async def one(problem: Problem) -> None:
        async with queued:
            completions = await worker.generate(renderer.render(problem), sampling, {})
        ends.append(time.monotonic())
        lengths.append(sum(len(completion.token_ids_T) for completion in completions))

    # More than are counted, so that the engine is as full at the end as in the middle.
    spare = 2 * PROMPTS_PER_STEP
    tasks = [asyncio.create_task(one(problem)) for problem in problems(groups + spare)]
    while len(ends) < groups:
        await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await worker.stop()
    return ends[:groups], lengths[:groups]


class _InProcess:
    """A rank of the learner in this very process, with the coroutines that `LearnerGroup` calls."""

    def __init__(self, rank: Any) -> None:
        self._rank = rank

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: object) -> Any:
            return getattr(self._rank, name)(*arguments)

        return call


def run_learner_alone(work: Path, steps: int, warmup: int) -> Measured:
    """The learner's rank on one core, on made-up trajectories with the lengths of W; without publishing."""
    os.sched_setaffinity(0, {two_cores()[0]})
    return asyncio.run(_learn(work, steps, warmup))


async def _learn(work: Path, steps: int, warmup: int) -> Measured:
    import torch

    from actors.learner import LearnerGroup
    from actors.learner_rank import LearnerOptions, LearnerRank
    from actors.models import encoder_factory, policy_directory, quieten_libraries
    from actors.ports import Objective
    from rlsys.algorithms.objective import PolicyObjective
    from rlsys.data.batches import BatchMaker

    quieten_libraries()
    torch.set_num_threads(1)
    config = configuration(work, steps + warmup)
    model = policy_directory(config, work / "models", encoder_factory(config, work / "models"), texts=())
    options = LearnerOptions(str(model), config.learner, lora=None, seed=0, weights_dir=str(work / "published"))
    rank: Any = _InProcess(LearnerRank(options, 0))
    learner = LearnerGroup([rank], config.learner, pad_token_id=0)
    await learner.join()
    await learner.enter(Objective(PolicyObjective.from_config(config.grpo), LEARNING_RATE, 0, temperature=1.0))
    maker = BatchMaker(config.grpo, MAX_NEW_TOKENS)
    seconds, trained, publishing = list[float](), list[int](), list[float]()
    for step in range(steps + warmup):
        batch = maker.make(synthetic_groups(step, learner.version))
        await learner.accumulate(batch.samples, [])
        report = await learner.step()
        seconds.append(report.seconds)
        trained.append(report.tokens)
        started = time.monotonic()
        await learner.publish()
        publishing.append(time.monotonic() - started)
    return Measured(
        step_seconds=seconds[warmup:],
        trained_tokens=sum(trained[warmup:]),
        completion_tokens_mean=sum(trained[warmup:]) / steps / TRAJECTORIES_PER_STEP,
        details={"publish_seconds": sum(publishing[warmup:]) / steps},
    )


def synthetic_groups(seed: int, version: int) -> list[TrajectoryGroup]:
    """A step's groups with the lengths of W and random tokens, as likely as under a uniform policy."""
    chance = np.random.default_rng(seed)
    renderer = WordRenderer()
    return [
        TrajectoryGroup(
            ticket, problem, renderer.render(problem), tuple(_synthetic(chance, version) for _ in range(GROUP_SIZE))
        )
        for ticket, problem in enumerate(problems(PROMPTS_PER_STEP, seed))
    ]


def _synthetic(chance: np.random.Generator, version: int) -> Trajectory:
    length = min(int(chance.geometric(len(END_IDS) / VOCABULARY)), MAX_NEW_TOKENS)
    completion = Completion(
        token_ids_T=chance.integers(FIRST_WORD_ID, VOCABULARY, length),
        behavior_logprobs_T=np.full(length, -np.log(VOCABULARY), np.float32),
        version_spans=(VersionSpan(version, 0, length),),
        text="",
        finish_reason=FinishReason.STOP if length < MAX_NEW_TOKENS else FinishReason.LENGTH,
    )
    reward = float(chance.random())
    return Trajectory(completion, Score({"even": PartScore(reward, PartStatus.OK)}, reward))
