"""A controller with scripted roles round it, put together as `actors.grpo_phase` does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from actors.controller import Controller, StepRecord
from actors.embedder_pool import EmbedderPool
from actors.episodes import Episodes
from actors.evaluator import Evaluated, evaluate
from actors.interleaved import InterleavedEvaluation
from actors.ports import RolloutWorker, Sampling
from actors.roll_out import RollOut
from actors.rollout_pool import RolloutPool
from actors.scorer_pool import ScorerPool
from actors.step_metrics import StepMetrics
from rlsys.config import GrpoConfig, RewardPartConfig
from rlsys.data.batches import BatchMaker
from rlsys.data.cursor import ProblemCursor
from rlsys.pipeline.buffer import BufferSnapshot, TrajectoryBuffer
from rlsys.pipeline.lengths import LengthLog
from rlsys.pipeline.staleness import make_policy
from rlsys.pipeline.waits import Role, WaitClock, WaitTimes
from rlsys.rewards.failures import FailureGuard
from rlsys.types import Problem, TrajectoryGroup
from tests.fakes import FakeEmbedder, FakeLearner, FakeRenderer, FakeScorer, FakeWorker, problem

GROUPS_PER_STEP = 3
START_SECONDS = 5.0
"""How long a new worker takes to start."""
HELD_OUT = [problem(number) for number in range(100, 106)]


class Rig:
    """Set what the roles do, then `train`."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        bound: int = 1,
        steps: int = 12,
        reward: Callable[[Problem, str], float] | None = None,
        max_failed: float = 0.2,
        turns: Callable[[], int] = lambda: 1,
        workers: int = 2,
        every_versions: int | None = None,
        evaluated: Sequence[int] = (),
        snapshot: tuple[BufferSnapshot, int] | None = None,
        learner_ranks: int = 1,
        replacements: int = 0,
        **grpo: Any,
    ) -> None:
        """`snapshot` is what a checkpoint kept of a buffer, with the learner's version then."""
        self.steps = steps
        self.learner = FakeLearner()
        self.workers = [FakeWorker(turns) for _ in range(workers)]
        self.embedder = FakeEmbedder()
        self.scorer = FakeScorer(reward) if reward else FakeScorer()
        self.records: list[StepRecord] = []
        self.evaluated: list[int] = []
        self.waits: WaitTimes | None = None
        config = GrpoConfig(steps=steps, groups_per_step=GROUPS_PER_STEP, group_size=4, max_staleness=bound, **grpo)
        policy = make_policy(config.order, bound, GROUPS_PER_STEP)
        self.buffer = TrajectoryBuffer(policy)
        if snapshot is not None:
            self.buffer = TrajectoryBuffer.restore(policy, *snapshot)
            self.learner.version = snapshot[1]
            for worker in self.workers:
                worker.version = snapshot[1]
        self.clock = WaitClock(clock, dict.fromkeys(Role, 1) | {Role.ROLLOUT_WORKER: workers})
        self.said: list[str] = []
        self.ended: list[RolloutWorker] = []
        """Lost workers, each of which was ended before another was started."""
        self.prepare: Callable[[FakeWorker], None] = lambda worker: None
        """What is done to each worker that takes the place of a lost one."""
        self.pool = RolloutPool(
            tuple(self.workers), self.clock, self._replace, most_replacements=replacements, say=self.said.append
        )
        self.lengths = LengthLog()
        self.source = ProblemCursor([problem(number) for number in range(50)], 0, "grpo")
        self.batches = BatchMaker(config, max_new_tokens=8)
        self.metrics = StepMetrics(self.buffer, self.clock, self.lengths, self.batches)
        self.episodes = Episodes(FakeRenderer(), EmbedderPool([self.embedder], self.clock), self.pool)  # pyright: ignore[reportArgumentType]
        self.roll_out = self._roll_out(FailureGuard(max_failed))
        self.evaluation = InterleavedEvaluation(
            self.pool, every_versions, self._evaluate, lambda version, _: self.evaluated.append(version), evaluated
        )
        self.controller = self._controller(config, learner_ranks)

    def _controller(self, config: GrpoConfig, learner_ranks: int) -> Controller:
        return Controller(
            config,
            roll_out=self.roll_out,
            learner=self.learner,
            pool=self.pool,
            episodes=self.episodes,
            buffer=self.buffer,
            batches=self.batches,
            evaluation=self.evaluation,
            metrics=self.metrics,
            clock=self.clock,
            learner_ranks=learner_ranks,
        )

    def _roll_out(self, guard: FailureGuard) -> RollOut:
        return RollOut(
            Sampling(4, 1.0, 8),
            episodes=self.episodes,
            scorers=ScorerPool([self.scorer], _never, {"answer": RewardPartConfig(kind="answer")}, self.clock),
            activity=self.pool.activity,
            buffer=self.buffer,
            source=self.source,
            batches=self.batches,
            observers=[self.metrics.note_group, lambda _, group: guard.record(group.trajectories)],
            fruitless_groups=60,
        )

    async def _evaluate(self) -> Evaluated:
        return await evaluate(
            self.episodes, HELD_OUT, samples=1, temperature=1.0, max_new_tokens=8, floor=0.0, progress=lambda _: None
        )

    async def _replace(self, lost: RolloutWorker) -> RolloutWorker:
        self.ended.append(lost)
        await asyncio.sleep(START_SECONDS)
        worker = FakeWorker()
        self.prepare(worker)
        self.workers.append(worker)
        return worker

    async def train(self) -> None:
        """To the last step."""
        started = self.clock.totals()
        await self.controller.run(self.steps, self._after_step)
        self.waits = self.clock.totals() - started

    async def _after_step(self, record: StepRecord) -> None:
        self.records.append(record)
        self.buffer.ledger.check()

    @property
    def trained(self) -> list[list[TrajectoryGroup]]:
        """The groups of each step."""
        return [[group for part in record.parts for group in part.groups] for record in self.records]


async def _never(_: object) -> Any:
    raise AssertionError("no scorer hangs here")


def run_quickly(main: Coroutine[Any, Any, None]) -> None:
    """In a real event loop, for at most 20 seconds."""

    async def limited() -> None:
        await asyncio.wait_for(main, 20)

    asyncio.run(limited())
