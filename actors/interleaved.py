"""Evaluation while training goes on: held-out problems, written by the same engines, all by one policy version.

It begins when a version has just gone live, and keeps the next load waiting until its last completion is written, so
that no completion spans two versions. Training rollouts and the learner go on meanwhile; only the load waits, and what
waits for it is accounted under its own cause.

Invariant: all completions of an evaluation are of one version, and at most one evaluation is under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

from actors.evaluator import Evaluated
from actors.rollout_pool import RolloutPool
from rlsys.errors import RoleError
from rlsys.evaluation.accuracy import EvaluationResult


class InterleavedEvaluation:
    """Evaluates every so many versions."""

    def __init__(
        self,
        pool: RolloutPool,
        every_versions: int | None,
        evaluate: Callable[[], Awaitable[Evaluated]],
        report: Callable[[int, EvaluationResult], None],
        evaluated: Collection[int] = (),
    ) -> None:
        """`report` gets the version and its result; None for `every_versions` never evaluates. Versions in `evaluated`
        were evaluated before the run was resumed.
        """
        self._pool = pool
        self._every_versions = every_versions
        self._evaluate = evaluate
        self._report = report
        self._evaluated = evaluated
        self._under_way: asyncio.Task[None] | None = None

    def begin(self, version: int, tasks: asyncio.TaskGroup) -> None:
        """Note that `version` has just gone live on every worker, and evaluate it in `tasks` if its turn has come."""
        if self._every_versions is None or version % self._every_versions or version in self._evaluated:
            return
        assert self._under_way is None or self._under_way.done(), "no load, and so no version, goes past an evaluation"
        self._under_way = tasks.create_task(self._run(version))

    async def finish(self) -> None:
        """Wait for the evaluation that is under way, if any."""
        if self._under_way is not None:
            await self._under_way

    async def _run(self, version: int) -> None:
        with self._pool.holding_loads():
            evaluated = await self._evaluate()
        if evaluated.versions != frozenset({version}):
            raise RoleError(
                f"the evaluation of version {version} was written by versions {sorted(evaluated.versions)}; "
                "a worker took other weights meanwhile"
            )
        self._report(version, evaluated.result)
