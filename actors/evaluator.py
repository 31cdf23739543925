"""Held-out evaluation by the rollout workers themselves, on whatever weights they hold.

Sampled completions at the training temperature, and one greedy completion, of each problem. No training goes on
meanwhile, so all of them are written by one policy version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.episodes import Episodes
from actors.ports import Sampling
from rlsys.evaluation.accuracy import EvaluationResult, evaluate_texts
from rlsys.types import Problem

AT_ONCE = 64
"""Problems under way: enough to fill an engine, few enough to hold their features in memory."""


async def evaluate(
    episodes: Episodes,
    problems: Sequence[Problem],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    floor: float,
    progress: Callable[[int], None],
) -> EvaluationResult:
    """Evaluate on `problems`; `floor` is the best text-only accuracy on them. `progress` hears of each finished one."""
    gate = asyncio.Semaphore(AT_ONCE)
    sampled = Sampling(samples, temperature, max_new_tokens)
    greedy = Sampling(1, 0.0, max_new_tokens)

    async def texts(problem: Problem) -> tuple[list[str], str]:
        async with gate:
            many, one = await asyncio.gather(episodes.generate(problem, sampled), episodes.generate(problem, greedy))
        progress(1)
        return [completion.text for completion in many.completions], one.completions[0].text

    answers = await asyncio.gather(*(texts(problem) for problem in problems))
    return evaluate_texts(problems, [many for many, _ in answers], [one for _, one in answers], floor)
