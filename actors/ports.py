"""What the controller asks of each role: the interfaces, documented by the loop that calls them.

    ticket = await buffer.admit()                                        # waits for a slot (staleness bound)
    features, embedded = await embedder.embed(sequences_by_key)          # features stay where they are: a reference
    generated = await worker.generate(prompt, sampling, features)        # G completions
    scores = await scorer.score(problem, texts)                          # G scores
    buffer.put(group) ... groups = await buffer.take_batch()
    await learner.accumulate(samples, features)                          # gradients of a step, whole or in parts
    report = await learner.step()                                        # version v -> v + 1
    weights = await learner.publish()                                    # a file, a version, a checksum
    await worker.load(weights); buffer.release(...)                      # on every worker, then the slots are free

Every method may raise RoleError when its role died or missed its deadline. On Ray the same classes are reached
through `cluster.ActorProxy`, in tests through `tests.fakes`: the controller can't tell the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlsys.types import Completion, Problem, Prompt, Score, TrainSample

if TYPE_CHECKING:
    from rlsys.algorithms.objective import PolicyObjective
    from rlsys.models.vllm_plugin.options import EngineStats
    from rlsys.models.weights import WeightFile

Features = Mapping[str, NDArray[np.float32]]
"""Frozen encoder output by content key, each [S, E]."""

FeaturesRef = Any
"""Features, or on Ray a reference to them in the object store of the node where they were made."""


@dataclass(frozen=True)
class EmbedReport:
    """What one embedding request cost."""

    hits: int
    misses: int
    seconds: float
    """From the request's arrival to its features, queueing included."""


@dataclass(frozen=True)
class Sampling:
    """How the completions of one prompt are drawn."""

    completions: int
    temperature: float
    """0 is greedy."""
    max_new_tokens: int


@dataclass(frozen=True)
class Objective:
    """What the learner's optimizer is for: entering one makes a fresh optimizer and counts versions from 0."""

    policy: PolicyObjective | None
    """Policy loss, correction and regularisers; None is the negative log-likelihood of demonstrations (SFT)."""
    learning_rate: float
    warmup_steps: int
    temperature: float
    """Logits are divided by it, as the engine does when it samples."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    version: int
    """The policy version that the step made."""
    tokens: int
    """Tokens in the loss, over all ranks."""
    seconds: float
    metrics: Mapping[str, float]
    """Values by metric name (`rlsys.metrics`)."""


class EmbeddingService(Protocol):
    """The frozen DNA encoder, with its cache."""

    async def embed(self, sequences_by_key: Mapping[str, str]) -> tuple[FeaturesRef, EmbedReport]:
        """Features of each sequence, under its key; the first result stays a reference on Ray."""
        ...


class RolloutWorker(Protocol):
    """One vLLM engine."""

    async def generate(self, prompt: Prompt, sampling: Sampling, features: FeaturesRef) -> tuple[Completion, ...]:
        """Write the completions of one prompt. Goes on through weight loads; each token knows its version."""
        ...

    async def load(self, weights: WeightFile) -> float:
        """Switch to the published weights, requests in flight included; returns the seconds that it took."""
        ...

    async def stats(self) -> EngineStats:
        """The engine's counters."""
        ...

    async def stop(self) -> None:
        """End the engine and its processes."""
        ...


class RewardScorer(Protocol):
    """The reward parts, in a process of their own."""

    async def score(self, problem: Problem, texts: Sequence[str]) -> list[Score]:
        """Score completions of one problem, each part within its time limit."""
        ...


class Learner(Protocol):
    """All DeepSpeed ranks, as one."""

    @property
    def version(self) -> int:
        """Optimizer steps in this phase: the policy version that the learner holds."""
        ...

    async def enter(self, objective: Objective) -> None:
        """Begin with a fresh optimizer; the weights stay, the version is 0."""
        ...

    async def accumulate(self, samples: Sequence[TrainSample], features: Sequence[FeaturesRef]) -> None:
        """Add the gradients of samples to the next step's; `features` hold every key that the samples name."""
        ...

    async def probe(self, samples: Sequence[TrainSample], features: Sequence[FeaturesRef]) -> None:
        """Measure the mismatch of engine and learner on `samples`, for the metrics of the next step; trains nothing."""
        ...

    async def step(self) -> StepReport:
        """One optimizer step with the gradients that were accumulated."""
        ...

    async def publish(self) -> WeightFile:
        """Write the current weights where the workers load them."""
        ...

    async def save(self, directory: Path) -> None:
        """Write optimizer, scheduler and weights for `restore`."""
        ...

    async def restore(self, directory: Path, objective: Objective, version: int) -> None:
        """Go on exactly where `save` was called, at `version` of `objective`."""
        ...

    async def save_policy(self, directory: Path) -> None:
        """Write the policy as a Hugging Face directory."""
        ...
