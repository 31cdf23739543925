"""Held-out evaluation by the rollout workers themselves, on whatever weights they hold.

Sampled completions at the training temperature, and one greedy completion, of each problem. Which policy versions wrote
them is part of the answer: the caller sees to it that it is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.episodes import Episodes
from actors.ports import Sampling
from rlsys.evaluation.accuracy import EvaluationResult, evaluate_texts
from rlsys.types import Completion, Problem

AT_ONCE = 64
"""Problems under way: enough to fill an engine, few enough to hold their features in memory."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found, and whose it is."""

    result: EvaluationResult
    versions: frozenset[int]
    """The policy versions that wrote any of its tokens."""


async def evaluate(
    episodes: Episodes,
    problems: Sequence[Problem],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    floor: float,
    progress: Callable[[int], None],
) -> Evaluated:
    """Evaluate on `problems`; `floor` is the best text-only accuracy on them. `progress` hears of each finished one."""
    gate = asyncio.Semaphore(AT_ONCE)
    sampled = Sampling(samples, temperature, max_new_tokens)
    greedy = Sampling(1, 0.0, max_new_tokens)

    async def answer(problem: Problem) -> tuple[list[Completion], Completion]:
        async with gate:
            many, one = await asyncio.gather(
                episodes.generate(problem, sampled, evaluation=True),
                episodes.generate(problem, greedy, evaluation=True),
            )
        progress(1)
        return list(many.completions), one.completions[0]

    answers = await asyncio.gather(*(answer(problem) for problem in problems))
    result = evaluate_texts(
        problems, [[one.text for one in many] for many, _ in answers], [one.text for _, one in answers], floor
    )
    written = [completion for many, one in answers for completion in (*many, one)]
    return Evaluated(result, frozenset(span.version for one in written for span in one.version_spans))
