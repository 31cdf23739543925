"""Scripted roles that satisfy `actors.ports`, for tests of the controller without Ray, vLLM or DeepSpeed.

They do what their scripts say, in the event loop of the test, and write down what they were asked.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from actors.ports import EmbedReport, Features, Objective, Sampling, StepReport
from rlsys.models.vllm_plugin.options import EngineStats
from rlsys.models.weights import WeightFile
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
    VersionSpan,
)


def problem(number: int = 0) -> Problem:
    """A small problem with two sequences."""
    return Problem(f"problem-{number}", "What changes?", ("ACGTAC", "ACGGAC"), "p.Ala1Val missense", "demonstrated")


class FakeRenderer:
    """Renders any problem as three tokens and one slot of four for each sequence."""

    def render(self, problem: Problem) -> Prompt:
        """A prompt whose slots stand one after the other."""
        slots = tuple(DnaSlot(4 * index, 4, f"{problem.problem_id}/{index}") for index in range(len(problem.dna)))
        return Prompt(problem.problem_id, tuple(range(4 * len(slots) + 3)), slots)

    def demonstration_ids(self, problem: Problem) -> tuple[int, ...]:
        """Two tokens."""
        return (5, 6)


class FakeEmbedder:
    """Answers with zeros; remembers the keys that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.seconds = 0.0
        """How long an answer takes."""

    async def embed(self, sequences_by_key: Mapping[str, str]) -> tuple[Features, EmbedReport]:
        """Two positions of width 3 for each key."""
        self.asked += sequences_by_key
        await asyncio.sleep(self.seconds)
        features = {key: np.zeros((2, 3), np.float32) for key in sequences_by_key}
        return features, EmbedReport(hits=0, misses=len(features), seconds=0.0)


class FakeWorker:
    """Writes two-token completions with the version it holds; `turns` is how many loop turns a prompt takes."""

    def __init__(self, turns: Callable[[], int] = lambda: 1) -> None:
        self._turns = turns
        self.version = 0
        self.loaded: list[int] = []
        self.prompts_written = 0
        self.stopped = False
        self.seconds = 0.0
        """How long a prompt takes, beside its turns."""
        self.load_seconds = 0.0
        self.fails: Callable[[str, int], None] = lambda call, version: None
        """Asked at each call, with its name and the version: may raise."""

    async def generate(self, prompt: Prompt, sampling: Sampling, features: Features) -> tuple[Completion, ...]:
        """Completions whose tokens all have the version at their start."""
        version = self.version
        self.prompts_written += 1
        for _ in range(self._turns()):
            await asyncio.sleep(0)
        await asyncio.sleep(self.seconds)
        self.fails("generate", version)
        return tuple(completion(version, text=str(number)) for number in range(sampling.completions))

    async def load(self, weights: WeightFile) -> float:
        """Take the version, a few turns later."""
        for _ in range(3):
            await asyncio.sleep(0)
        await asyncio.sleep(self.load_seconds)
        self.fails("load", weights.version)
        self.version = weights.version
        self.loaded.append(weights.version)
        return 0.01

    async def stats(self) -> EngineStats:
        """Half of what was looked up was found."""
        return EngineStats(prefix_cache_queries=2, prefix_cache_hits=1)

    async def stop(self) -> None:
        """Remember that it was stopped."""
        self.fails("stop", self.version)
        self.stopped = True


def completion(version: int, text: str = "", tokens: int = 2) -> Completion:
    """A completion of `tokens` tokens, all of one version."""
    return Completion(
        np.arange(tokens),
        np.full(tokens, -0.5, np.float32),
        (VersionSpan(version, 0, tokens),),
        text,
        FinishReason.STOP,
    )


class FakeScorer:
    """Rewards by a function of problem number and text; a NaN is a failed part."""

    def __init__(self, reward: Callable[[Problem, str], float] = lambda problem, text: float(text == "0")) -> None:
        self._reward = reward
        self.seconds = 0.0
        """How long a group takes."""

    async def score(self, problem: Problem, texts: Sequence[str]) -> list[Score]:
        """One part, `answer`."""
        await asyncio.sleep(self.seconds)
        return [score(self._reward(problem, text)) for text in texts]


def score(reward: float) -> Score:
    """A score of one part; NaN is failed."""
    status = PartStatus.FAILED if np.isnan(reward) else PartStatus.OK
    return Score({"answer": PartScore(reward, status, "it broke" if np.isnan(reward) else "")}, reward)


class FakeLearner:
    """Counts steps; remembers the samples of each, and in how many parts they came."""

    def __init__(self) -> None:
        self.version = 0
        self.seconds = 0.0
        """How long an `accumulate` takes."""
        self.parts: list[int] = []
        self._accumulated: list[Sequence[TrainSample]] = []
        self.batches: list[Sequence[TrainSample]] = []
        self.published: list[int] = []
        self.probed: list[tuple[int, set[int]]] = []
        """The learner's version and those of the samples, of each probe."""

    async def enter(self, objective: Objective) -> None:
        """Start counting."""
        self.version = 0

    async def accumulate(self, samples: Sequence[TrainSample], features: Sequence[Features]) -> None:
        """Take samples, a turn long. Every slot's features must be there."""
        keys = {key for bundle in features for key in bundle}
        assert all(slot.key in keys for sample in samples for slot in sample.prompt.slots), "features are missing"
        await asyncio.sleep(self.seconds)
        self._accumulated.append(samples)

    async def probe(self, samples: Sequence[TrainSample], features: Sequence[Features]) -> None:
        """Remember the version that each sample ends with."""
        assert samples, "nothing to measure"
        await asyncio.sleep(0)
        self.probed.append((self.version, {int(sample.versions_T[-1]) for sample in samples}))

    async def step(self) -> StepReport:
        """One step on what was accumulated."""
        parts, self._accumulated = self._accumulated, []
        samples = [sample for part in parts for sample in part]
        self.parts.append(len(parts))
        self.batches.append(samples)
        self.version += 1
        return StepReport(self.version, sum(int(one.loss_mask_T.sum()) for one in samples), 0.1, {"train/loss": 0.0})

    async def publish(self) -> WeightFile:
        """A file that nobody reads."""
        self.published.append(self.version)
        return WeightFile("nowhere", self.version, "", 0)

    async def save(self, directory: Path) -> None:
        """Nothing to save."""

    async def restore(self, directory: Path, objective: Objective, version: int) -> None:
        """Take the version."""
        self.version = version

    async def save_policy(self, directory: Path) -> None:
        """Nothing to save."""


def ticking_clock() -> Callable[[], float]:
    """A clock that advances by one each time it is read."""
    ticks = itertools.count()
    return lambda: float(next(ticks))
