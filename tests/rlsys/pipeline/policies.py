"""The policies without their assertion at consumption, so that the rules are seen to hold the bound by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from rlsys.pipeline.staleness import EvictStaleness, StalenessPolicy, StrictStaleness, WindowedStaleness
from rlsys.types import TrajectoryGroup


class UncheckedStrict(StrictStaleness):
    def check(self, batch: Sequence[TrajectoryGroup], learner_version: int) -> None:
        pass


class UncheckedWindowed(WindowedStaleness):
    def check(self, batch: Sequence[TrajectoryGroup], learner_version: int) -> None:
        pass


class UncheckedEvict(EvictStaleness):
    def check(self, batch: Sequence[TrajectoryGroup], learner_version: int) -> None:
        pass


BOUNDS = st.integers(0, 4)
BATCH_SIZES = st.integers(1, 8)


@st.composite
def policies(draw: st.DrawFn) -> StalenessPolicy:
    """Any policy with S in 0..4 and P in 1..8; the window is up to the largest that there can be, S·P."""
    bound, groups_per_step = draw(BOUNDS), draw(BATCH_SIZES)
    match draw(st.sampled_from(["strict", "windowed", "evict"])):
        case "strict":
            return UncheckedStrict(bound, groups_per_step)
        case "windowed":
            return UncheckedWindowed(bound, groups_per_step, draw(st.integers(0, bound * groups_per_step)))
        case _:
            return UncheckedEvict(bound, groups_per_step)
