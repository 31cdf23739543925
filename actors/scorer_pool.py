"""All reward scorers as one: an idle scorer takes the next group, and one that hangs is replaced.

A scorer enforces its parts' time limits itself; the deadline here is for code that never returns to the interpreter.
Such a scorer is ended, another one takes its place, and the group's parts are counted as timed out, or as failed where
the scorer's process died: never as 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from actors.ports import RewardScorer
from rlsys.config import RewardPartConfig
from rlsys.errors import RoleError
from rlsys.pipeline.waits import Role, WaitClock
from rlsys.types import PartScore, PartStatus, Problem, Score

SLACK_SECONDS = 10.0
"""What a scorer may take beyond the time limits of its parts: the call's way, and a busy machine."""


class ScorerPool:
    """Scores groups, each on one idle scorer."""

    def __init__(
        self,
        scorers: Sequence[RewardScorer],
        replace: Callable[[RewardScorer], Awaitable[RewardScorer]],
        parts: Mapping[str, RewardPartConfig],
        clock: WaitClock,
    ) -> None:
        """`replace` ends a scorer, whatever it is doing, and starts another."""
        self._idle: asyncio.Queue[RewardScorer] = asyncio.Queue()
        for scorer in scorers:
            self._idle.put_nowait(scorer)
        self._replace = replace
        self._clock = clock
        self._parts = tuple(parts)
        self._seconds_per_text = sum(part.timeout_seconds for part in parts.values())

    async def score(self, problem: Problem, texts: Sequence[str]) -> list[Score]:
        """One Score for each text."""
        deadline = self._seconds_per_text * len(texts) + SLACK_SECONDS
        scorer = await self._idle.get()
        try:
            with self._clock.busy(Role.REWARD_SCORER):
                return await asyncio.wait_for(scorer.score(problem, texts), deadline)
        except (TimeoutError, RoleError) as error:
            why = str(error) or f"the scorer did not answer within {deadline:.0f} s and was replaced"
            status = PartStatus.TIMED_OUT if isinstance(error, TimeoutError) else PartStatus.FAILED
            scorer = await self._replace(scorer)
            lost = PartScore(float("nan"), status, why)
            return [Score(parts=dict.fromkeys(self._parts, lost), reward=float("nan")) for _ in texts]
        finally:
            self._idle.put_nowait(scorer)
