"""The warm start trains on the batches that its step numbers name, whether or not it was interrupted."""

from __future__ import annotations

import asyncio

from actors.embedder_pool import EmbedderPool
from actors.episodes import Episodes
from actors.ports import StepReport
from actors.warm_start import WarmStart
from rlsys.config import SftConfig
from rlsys.pipeline.waits import WaitClock
from tests.fakes import FakeEmbedder, FakeLearner, FakeRenderer, problem, ticking_clock

PROBLEMS = [problem(number) for number in range(10)]


def run(learner: FakeLearner, last: int) -> list[int]:
    told: list[int] = []

    async def after_step(report: StepReport) -> None:
        told.append(report.version)

    embedders = EmbedderPool([FakeEmbedder()], WaitClock(ticking_clock(), {}))
    episodes = Episodes(FakeRenderer(), embedders, None)  # pyright: ignore[reportArgumentType]
    warm_start = WarmStart(SftConfig(steps=9, batch_size=4), learner, episodes, PROBLEMS, seed=0)
    asyncio.run(warm_start.run(last, after_step))
    return told


def trained(learner: FakeLearner) -> list[list[str]]:
    return [[sample.prompt.problem_id for sample in batch] for batch in learner.batches]


def test_an_interrupted_warm_start_trains_on_the_same_batches() -> None:
    whole, parts = FakeLearner(), FakeLearner()
    assert run(whole, 6) == [1, 2, 3, 4, 5, 6]
    run(parts, 2)
    run(parts, 6)
    assert trained(parts) == trained(whole)


def test_demonstrations_are_trained_with_their_end_token() -> None:
    learner = FakeLearner()
    run(learner, 1)
    assert all(sample.continuation_ids_T.tolist() == [5, 6] for sample in learner.batches[0])
    assert all(sample.loss_mask_T.tolist() == [1, 1] for sample in learner.batches[0])
