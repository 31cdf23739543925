"""The learner as the controller sees it: all ranks as one.

Packs a batch for the ranks, calls every rank in the same order, adds what they report. One owner, one call at a time:
a lock keeps the ranks' collectives from ever interleaving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from actors.ports import FeaturesRef, Objective, StepReport
from rlsys.algorithms.ratios import RatioSums, ratio_metrics
from rlsys.config import LearnerConfig
from rlsys.data.packing import MicroBatch, pack, separate_tokens
from rlsys.errors import RlsysError, RoleError
from rlsys.types import TrainSample

if TYPE_CHECKING:
    from actors.learner_rank import PartSums, StepEnd
    from rlsys.models.weights import WeightFile


class Rank(Protocol):
    """What the group asks of each rank (see `actors.learner_rank`)."""

    async def address(self) -> tuple[str, int]: ...
    async def join(self, host: str, port: int) -> None: ...
    async def enter(self, objective: Objective) -> None: ...
    async def step_log_ratios(
        self, micro_batches: Sequence[MicroBatch], *features: FeaturesRef
    ) -> NDArray[np.float64]: ...
    async def probe(self, micro_batches: Sequence[MicroBatch], *features: FeaturesRef) -> RatioSums: ...
    async def accumulate(
        self, micro_batches: Sequence[MicroBatch], threshold: float | None, *features: FeaturesRef
    ) -> PartSums: ...
    async def step(self) -> StepEnd: ...
    async def publish(self) -> WeightFile | None: ...
    async def save_policy(self, directory: str) -> None: ...
    async def save(self, directory: str) -> None: ...
    async def restore(self, directory: str, objective: Objective) -> None: ...


class LearnerGroup:
    """All ranks of the learner, behind the `Learner` port."""

    def __init__(self, ranks: Sequence[Rank], config: LearnerConfig, pad_token_id: int) -> None:
        self._ranks = ranks
        self._config = config
        self._pad_token_id = pad_token_id
        self._collective = asyncio.Lock()
        self._begin(Objective(None, 0.0, 0, 1.0), version=0)

    @property
    def version(self) -> int:
        """Optimizer steps in this phase."""
        return self._version

    async def join(self) -> None:
        """Let all ranks meet and load the policy."""
        host, port = await self._ranks[0].address()
        await self._on_all(lambda rank: rank.join(host, port))

    async def enter(self, objective: Objective) -> None:
        """Begin a phase with a fresh optimizer."""
        await self._on_all(lambda rank: rank.enter(objective))
        self._begin(objective, version=0)

    def _begin(self, objective: Objective, version: int) -> None:
        self._objective = objective
        self._version = version
        self._parts: list[_Part] = []
        self._probed = RatioSums.zero()

    async def accumulate(self, samples: Sequence[TrainSample], features: Sequence[FeaturesRef]) -> None:
        """Add the gradients of samples, on all ranks, to the next step's."""
        plan = self._plan(samples)
        threshold = await self._threshold(plan, features)
        sums = await self._on_all(lambda rank: rank.accumulate(plan[id(rank)], threshold, *features))
        run_tokens = sum(one.num_tokens for line in plan.values() for one in line)
        self._parts.append(_Part(sums, separate_tokens(samples), run_tokens))

    async def probe(self, samples: Sequence[TrainSample], features: Sequence[FeaturesRef]) -> None:
        """Measure the mismatch of engine and learner on `samples`, for the metrics of the next step; trains nothing.

        Only their tokens of the learner's version tell of it; others are left out.
        """
        plan = self._plan(samples)
        sums = await self._on_all(lambda rank: rank.probe(plan[id(rank)], *features))
        self._probed = sum(sums, self._probed)

    def _plan(self, samples: Sequence[TrainSample]) -> Mapping[int, Sequence[MicroBatch]]:
        """The micro-batches of each rank, by its identity."""
        plan = pack(
            samples,
            micro_batch_tokens=self._config.micro_batch_tokens,
            num_ranks=self._config.ranks,
            pad_token_id=self._pad_token_id,
        )
        return dict(zip(map(id, self._ranks), plan, strict=True))

    async def _threshold(
        self, plan: Mapping[int, Sequence[MicroBatch]], features: Sequence[FeaturesRef]
    ) -> float | None:
        """What a loss that masks by the whole step's ratios needs: a forward pass on all ranks before the first."""
        policy = self._objective.policy
        if policy is None or not policy.needs_step_threshold:
            return None
        ratios = await self._on_all(lambda rank: rank.step_log_ratios(plan[id(rank)], *features))
        return policy.step_threshold(torch.from_numpy(np.concatenate(ratios)))

    async def step(self) -> StepReport:
        """One optimizer step with the gradients that were accumulated."""
        ends = await self._on_all(lambda rank: rank.step())
        parts, self._parts = self._parts, []
        probed, self._probed = self._probed, RatioSums.zero()
        self._version += 1
        return StepReport(
            version=self._version,
            tokens=sum(one.tokens for part in parts for one in part.sums),
            seconds=sum(max(one.seconds for one in part.sums) for part in parts) + max(end.seconds for end in ends),
            metrics=_metrics(parts, probed, ends[0]),
        )

    async def publish(self) -> WeightFile:
        """Write the current weights where the workers load them."""
        files = await self._on_all(lambda rank: rank.publish())
        assert files[0] is not None, "rank 0 writes the weights"
        return files[0]

    async def save(self, directory: Path) -> None:
        """Write the ranks' state."""
        await self._on_all(lambda rank: rank.save(str(directory)))

    async def restore(self, directory: Path, objective: Objective, version: int) -> None:
        """Go on exactly where `save` was called, at `version` of `objective`."""
        await self._on_all(lambda rank: rank.restore(str(directory), objective))
        self._begin(objective, version)

    async def save_policy(self, directory: Path) -> None:
        """Write the policy as a Hugging Face directory."""
        await self._on_all(lambda rank: rank.save_policy(str(directory)))

    async def _on_all(self, call: Callable[[Rank], Awaitable[Any]]) -> list[Any]:
        """The call on every rank at once. The first error wins: the others then fail because a peer is missing."""
        async with self._collective:
            results = await asyncio.gather(*(call(rank) for rank in self._ranks), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        users = [error for error in errors if isinstance(error, RlsysError) and not isinstance(error, RoleError)]
        for error in [*users, *errors]:
            raise error
        return results


@dataclass(frozen=True)
class _Part:
    """What the ranks added to a step at once."""

    sums: Sequence[PartSums]
    separate_tokens: int
    """Tokens of the samples, each with a prompt of its own."""
    run_tokens: int
    """Tokens that the model ran: the prompt of a group once."""


def _metrics(parts: Sequence[_Part], probed: RatioSums, end: StepEnd) -> Mapping[str, float]:
    from actors.learner_rank import add_parts  # torch, which the driver loads only where there is a learner

    sums = add_parts([one for part in parts for one in part.sums], seconds=0.0)
    tokens = max(1, sums.tokens)
    return {
        "train/loss": sums.loss,
        "train/entropy": sums.entropy / tokens,
        "train/gradient_norm": end.gradient_norm,
        "train/step_skipped": float(not end.was_applied),
        "train/learning_rate": end.learning_rate,
        "train/prompt_sharing": sum(part.separate_tokens for part in parts) / sum(part.run_tokens for part in parts),
        **({"train/reference_kl": sums.kl / tokens} if sums.kl is not None else {}),
        **ratio_metrics(sums.ratios, probed),
    }
