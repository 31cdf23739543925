"""The learner as the controller sees it: all ranks as one.

Packs a batch for the ranks, calls every rank in the same order, adds what they report. One owner, one call at a time:
a lock keeps the ranks' collectives from ever interleaving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from actors.ports import FeaturesRef, Objective, StepReport
from rlsys.algorithms.ratios import RatioSums, ratio_metrics
from rlsys.config import LearnerConfig
from rlsys.data.packing import MicroBatch, pack
from rlsys.errors import RlsysError, RoleError
from rlsys.types import TrainSample

if TYPE_CHECKING:
    from actors.learner_rank import StepSums
    from rlsys.models.weights import WeightFile


class Rank(Protocol):
    """What the group asks of each rank (see `actors.learner_rank`)."""

    async def address(self) -> tuple[str, int]: ...
    async def join(self, host: str, port: int) -> None: ...
    async def enter(self, objective: Objective) -> None: ...
    async def step(
        self, micro_batches: Sequence[MicroBatch], total_tokens: int, *features: FeaturesRef
    ) -> StepSums: ...
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
        self._version = 0
        self._collective = asyncio.Lock()

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
        self._version = 0

    async def step(self, samples: Sequence[TrainSample], features: Sequence[FeaturesRef]) -> StepReport:
        """One optimizer step on the samples of a whole batch."""
        plan = pack(
            samples,
            row_tokens=self._config.row_tokens,
            rows_per_micro_batch=self._config.rows_per_micro_batch,
            num_ranks=self._config.ranks,
            pad_token_id=self._pad_token_id,
        )
        tokens = sum(batch.num_loss_tokens for batches in plan for batch in batches)
        numbered = dict(zip(map(id, self._ranks), plan, strict=True))
        sums = await self._on_all(lambda rank: rank.step(numbered[id(rank)], tokens, *features))
        self._version += 1
        return StepReport(
            version=self._version,
            tokens=tokens,
            seconds=max(one.seconds for one in sums),
            metrics=self._metrics(sums, plan),
        )

    def _metrics(self, sums: Sequence[StepSums], plan: Sequence[Sequence[MicroBatch]]) -> Mapping[str, float]:
        tokens = max(1, sum(one.tokens for one in sums))
        all_tokens = sum((one.all_tokens for one in sums), RatioSums.zero())
        same_version = sum((one.same_version for one in sums), RatioSums.zero())
        packed = sum(batch.num_tokens for batches in plan for batch in batches)
        room = sum(batch.input_ids_BT.size for batches in plan for batch in batches)
        return {
            "train/loss": sum(one.loss for one in sums) / tokens,
            "train/entropy": sum(one.entropy for one in sums) / tokens,
            "train/gradient_norm": sums[0].gradient_norm,
            "train/learning_rate": sums[0].learning_rate,
            "train/packing_efficiency": packed / room,
            **ratio_metrics(all_tokens, same_version),
        }

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
        self._version = version

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
