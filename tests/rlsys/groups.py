"""Small problems, groups and samples for the tests of the core."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlsys.types import (
    Completion,
    DnaSlot,
    FinishReason,
    PartScore,
    PartStatus,
    Problem,
    Prompt,
    Score,
    TrainSample,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
)


def make_problem(name: str | int) -> Problem:
    return Problem(problem_id=str(name), question="?", dna=("ACGT",), answer="a", demonstration="")


def make_trajectory(
    spans: Sequence[tuple[int, int]] = ((0, 3),),
    reward: float = 1.0,
    finish_reason: FinishReason = FinishReason.STOP,
) -> Trajectory:
    """`spans` are (version, tokens) pairs; a NaN reward is a score that failed."""
    length = sum(tokens for _, tokens in spans)
    version_spans: list[VersionSpan] = []
    start = 0
    for version, tokens in spans:
        version_spans.append(VersionSpan(version, start, start + tokens))
        start += tokens
    status = PartStatus.FAILED if np.isnan(reward) else PartStatus.OK
    completion = Completion(
        token_ids_T=np.arange(100, 100 + length, dtype=np.int64),
        behavior_logprobs_T=-0.1 * np.arange(1, length + 1, dtype=np.float32),
        version_spans=tuple(version_spans),
        text="",
        finish_reason=finish_reason,
    )
    return Trajectory(completion, Score({"answer": PartScore(reward, status)}, reward))


def make_group(ticket: int, trajectories: Sequence[Trajectory], problem: Problem | None = None) -> TrajectoryGroup:
    problem = make_problem(ticket) if problem is None else problem
    prompt = Prompt(problem.problem_id, token_ids=(1, 2, 3, 4, 5), slots=(DnaSlot(1, 3, f"key-{problem.problem_id}"),))
    return TrajectoryGroup(ticket, problem, prompt, tuple(trajectories))


def make_sample(group: int, prompt_tokens: int, continuation_tokens: int, seed: int = 0) -> TrainSample:
    """Random ids and log-probabilities, the group's prompt; one DNA slot at positions 1 and 2 where there is room."""
    prompt_ids = np.random.default_rng([group, prompt_tokens]).integers(1, 50, prompt_tokens)
    random = np.random.default_rng([group, prompt_tokens, continuation_tokens, seed])
    slots = (DnaSlot(1, 2, f"key-{group}"),) if prompt_tokens >= 3 else ()
    return TrainSample(
        group=group,
        prompt=Prompt(f"p{group}", tuple(map(int, prompt_ids)), slots),
        continuation_ids_T=random.integers(1, 50, continuation_tokens),
        behavior_logprobs_T=-random.random(continuation_tokens).astype(np.float32),
        versions_T=np.sort(random.integers(0, 4, continuation_tokens)),
        loss_mask_T=np.ones(continuation_tokens, dtype=np.float32),
        advantage=float(random.normal()),
        token_weight=float(random.random()),
    )
