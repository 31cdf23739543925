"""Puts the five roles on the cluster: what each needs, where it runs, and in which order they start.

Roles start at the same time; the learner's ranks and the engines, which take longest, first.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.cluster import CPU_ENGINE_ENVIRONMENT, ActorProxy, Cluster, Resources, shared_memory_directory
from actors.embedder_pool import EmbedderPool
from actors.embedding_service import EmbeddingService
from actors.learner import LearnerGroup
from actors.models import EncoderFactory
from actors.reward_scorer import RewardScorer
from actors.rollout_pool import RolloutPool
from actors.scorer_pool import ScorerPool
from rlsys.config import Config
from rlsys.errors import RlsysError, RoleError
from rlsys.pipeline.waits import Role, WaitClock


@dataclass(frozen=True)
class Demand:
    """One role's processes and what each needs."""

    role: str
    processes: int
    each: Resources


def demands(config: Config) -> list[Demand]:
    """What the run needs from the cluster, by role."""
    return [
        Demand("learner", config.learner.ranks, Resources(config.learner.cpus, config.learner.gpus)),
        Demand("rollout worker", config.rollout.workers, Resources(config.rollout.cpus, config.rollout.gpus)),
        Demand("embedding service", config.embedding.replicas, Resources(config.embedding.cpus, config.embedding.gpus)),
        Demand("reward scorer", config.scoring.scorers, Resources(config.scoring.cpus, 0)),
    ]


def members(config: Config) -> dict[Role, int]:
    """How many of each role work on their own, for the wait clock; the learner's ranks work as one."""
    return {
        Role.LEARNER: 1,
        Role.ROLLOUT_WORKER: config.rollout.workers,
        Role.EMBEDDING_SERVICE: config.embedding.replicas,
        Role.REWARD_SCORER: config.scoring.scorers,
    }


@dataclass
class Roles:
    """The placed roles, as the controller calls them."""

    learner: LearnerGroup
    pool: RolloutPool
    embedders: EmbedderPool
    scorers: ScorerPool


class Placement:
    """Starts the roles of one run on a cluster. A context: the shared memory for weights is given back at its end."""

    def __init__(
        self,
        cluster: Cluster,
        config: Config,
        model_dir: Path,
        encoder: EncoderFactory,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`say` hears of rollout workers that are lost and replaced."""
        self._say = say
        self._cluster = cluster
        self._config = config
        self._model_dir = str(model_dir)
        self._encoder = encoder
        self._weights_dir = shared_memory_directory()
        self._scorer_numbers = itertools.count()
        self._worker_numbers = itertools.count()
        self._placed: list[ActorProxy] = []
        """Who must share a host: the learner's first rank and the rollout workers."""

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._weights_dir, ignore_errors=True)

    async def all_roles(self, clock: WaitClock, pad_token_id: int) -> Roles:
        """Start every role at once; returns when all are ready."""
        async with asyncio.TaskGroup() as tasks:
            learner = tasks.create_task(self._learner(pad_token_id))
            pool = tasks.create_task(self.rollout_pool(clock))
            embedders = tasks.create_task(self.embedder_pool(clock))
            scorers = tasks.create_task(self._scorer_pool(clock))
        await self._check_one_host()
        return Roles(learner.result(), pool.result(), embedders.result(), scorers.result())

    async def _check_one_host(self) -> None:
        nodes = {await self._cluster.node_of(proxy) for proxy in self._placed}
        if len(nodes) > 1:
            raise RoleError(
                f"learner and rollout workers were placed on {len(nodes)} nodes, and weights travel through the shared "
                "memory of one.\nGive the run nodes that each have room for the learner's first rank and all "
                "rollout workers, or lower their CPUs and GPUs"
            )

    async def rollout_pool(self, clock: WaitClock) -> RolloutPool:
        """Start the rollout workers."""
        rollout = self._config.rollout
        return RolloutPool(
            await asyncio.gather(*(self._rollout_worker() for _ in range(rollout.workers))),
            clock,
            self._replace_rollout_worker,
            most_replacements=rollout.replacements,
            say=self._say,
        )

    async def embedder_pool(self, clock: WaitClock) -> EmbedderPool:
        """Start the replicas of the embedding service."""
        return EmbedderPool(await asyncio.gather(*map(self._embedder, range(self._config.embedding.replicas))), clock)

    async def _scorer_pool(self, clock: WaitClock) -> ScorerPool:
        scorers = await asyncio.gather(*(self._scorer() for _ in range(self._config.scoring.scorers)))
        return ScorerPool(scorers, self._replace_scorer, self._config.rewards, clock)

    async def _learner(self, pad_token_id: int) -> LearnerGroup:
        from actors.learner_rank import LearnerOptions, LearnerRank

        config = self._config
        options = LearnerOptions(
            model_dir=self._model_dir,
            config=config.learner,
            lora=config.policy.lora,
            seed=config.seed,
            weights_dir=str(self._weights_dir),
        )
        resources = Resources(config.learner.cpus, config.learner.gpus)
        environment = {"DS_ACCELERATOR": "cuda" if config.learner.gpus else "cpu"}
        ranks = await asyncio.gather(
            *(
                self._cluster.place(
                    f"learner {rank}", LearnerRank, options, rank, resources=resources, environment=environment
                )
                for rank in range(config.learner.ranks)
            )
        )
        self._placed += ranks[:1]  # the rank that publishes weights
        group = LearnerGroup(ranks, config.learner, pad_token_id)
        await group.join()
        return group

    async def _rollout_worker(self) -> Any:
        from actors.rollout_worker import RolloutWorker
        from rlsys.models.vllm_plugin.options import EngineOptions

        rollout, number = self._config.rollout, next(self._worker_numbers)
        options = EngineOptions(
            model_dir=self._model_dir,
            dtype="bfloat16" if self._config.learner.precision == "bf16" else "float32",
            max_model_len=rollout.max_model_tokens,
            max_num_seqs=rollout.max_running,
            kv_cache_bytes=int(rollout.kv_cache_gb * 2**30) if rollout.kv_cache_gb is not None else None,
            tensor_parallel_size=max(1, int(rollout.gpus)),
            seed=self._config.seed + number,
        )
        environment = {"VLLM_LOGGING_LEVEL": "WARNING"} if rollout.gpus else CPU_ENGINE_ENVIRONMENT
        worker = await self._cluster.place(
            f"rollout worker {number}",
            RolloutWorker,
            options,
            resources=Resources(rollout.cpus, rollout.gpus),
            environment=environment,
            concurrency=10_000,
        )
        self._placed.append(worker)
        try:
            await worker.start()
        except RlsysError:
            self._end_worker(worker)  # or what it holds would be missing to its successor
            raise
        return worker

    def _end_worker(self, worker: ActorProxy) -> None:
        """End a rollout worker, if that was not done before."""
        if worker in self._placed:
            self._placed.remove(worker)
            self._cluster.kill(worker)

    async def _replace_rollout_worker(self, lost: Any) -> Any:
        assert isinstance(lost, ActorProxy), "workers are placed on the cluster"
        self._end_worker(lost)
        worker = await self._rollout_worker()
        try:
            await self._check_one_host()
        except RoleError:
            self._end_worker(worker)
            raise
        return worker

    async def _embedder(self, number: int) -> Any:
        embedding = self._config.embedding
        return await self._cluster.place(
            f"embedding service {number}",
            EmbeddingService,
            self._encoder,
            embedding.batch_size,
            int(embedding.cache_gb * 2**30),
            resources=Resources(embedding.cpus, embedding.gpus),
            concurrency=10_000,
            by_reference=("embed",),
        )

    async def _scorer(self) -> Any:
        return await self._cluster.place(
            f"reward scorer {next(self._scorer_numbers)}",
            RewardScorer,
            dict(self._config.rewards),
            resources=Resources(self._config.scoring.cpus, 0),
        )

    async def _replace_scorer(self, lost: Any) -> Any:
        assert isinstance(lost, ActorProxy), "scorers are placed on the cluster"
        self._cluster.kill(lost)
        return await self._scorer()
