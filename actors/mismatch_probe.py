"""Keeps engine and learner comparable in a full pipeline, where a step's own groups have no token of its version.

The mismatch of the two at equal version shows what is wrong in either (a weight load that went astray, kernels,
rounding), and nothing else does: at unequal versions it is lost in what the policy learned. The learner holds version
v until its next step, and completions of v are finished meanwhile, as groups of later steps. A few of them are run
through the learner before that step. Where the step's own groups have such tokens, they are measured anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.ports import FeaturesRef, Learner
from rlsys.data.batches import BatchMaker
from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.types import TrainSample, TrajectoryGroup

MOST_COMPLETIONS = 4
"""Completions of one group: some hundred tokens are enough for a mean, and cost about a percent of a step."""


class MismatchProbe:
    """Asked before each step."""

    def __init__(
        self,
        learner: Learner,
        buffer: TrajectoryBuffer,
        batches: BatchMaker,
        features: Mapping[int, FeaturesRef],
    ) -> None:
        """`features` are those of groups in the buffer, by ticket, now and later."""
        self._learner = learner
        self._buffer = buffer
        self._batches = batches
        self._features = features

    async def run(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Let the learner measure completions of its own version, where the step's `groups` have no token of it."""
        version = self._learner.version
        if any(group.last_version >= version for group in groups):
            return
        for group in self._buffer.finished():
            if group.last_version >= version and group.ticket in self._features:
                samples = self._written_by(version, group)
                if samples:
                    await self._learner.probe(samples, [self._features[group.ticket]])
                    return

    def _written_by(self, version: int, group: TrajectoryGroup) -> list[TrainSample]:
        samples = self._batches.make([group]).samples
        return [sample for sample in samples if sample.versions_T[-1] == version][:MOST_COMPLETIONS]
