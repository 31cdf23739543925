"""The warm start: SFT on demonstrations, by the same learner that GRPO trains with.

Which problems a step trains on follows from its number alone, so that a checkpoint needs no cursor. The next batch is
rendered and embedded while the learner works on this one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from actors.episodes import Episodes
from actors.ports import FeaturesRef, Learner, StepReport
from rlsys.config import SftConfig
from rlsys.data.cursor import ProblemCursor
from rlsys.data.samples import demonstration_samples
from rlsys.types import Problem, TrainSample


class WarmStart:
    """Imitates demonstrations until the learner holds a given version."""

    def __init__(
        self, config: SftConfig, learner: Learner, episodes: Episodes, problems: Sequence[Problem], seed: int
    ) -> None:
        self._config = config
        self._learner = learner
        self._episodes = episodes
        self._problems = problems
        self._seed = seed

    async def run(self, last_version: int, after_step: Callable[[StepReport], Awaitable[None]]) -> None:
        """Train until the learner holds `last_version`; `after_step` is awaited after each step."""
        next_batch = asyncio.create_task(self._prepare(self._learner.version))
        try:
            while self._learner.version < last_version:
                samples, features = await next_batch
                next_batch = asyncio.create_task(self._prepare(self._learner.version + 1))
                await self._learner.accumulate(samples, features)
                await after_step(await self._learner.step())
        finally:
            next_batch.cancel()

    async def _prepare(self, step: int) -> tuple[list[TrainSample], list[FeaturesRef]]:
        cursor = ProblemCursor(self._problems, self._seed, "sft", position=step * self._config.batch_size)
        problems = cursor.take(self._config.batch_size)
        samples = demonstration_samples([self._episodes.demonstration(problem) for problem in problems])
        features = await self._episodes.embed(
            [(sample.prompt, problem) for sample, problem in zip(samples, problems, strict=True)]
        )
        return samples, features
