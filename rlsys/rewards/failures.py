"""When scoring fails too often, the run stops and says why: a broken reward would otherwise be trained on silence."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from rlsys.errors import RewardError
from rlsys.types import PartStatus, Trajectory

WINDOW = 256
"""Trajectories that are looked back on."""
FEWEST = 32
"""Trajectories before anything is decided: a first failure is not a share."""


class FailureGuard:
    """Counts trajectories that could not be scored."""

    def __init__(self, max_failed_fraction: float) -> None:
        self._max_failed_fraction = max_failed_fraction
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self.failed_parts: Counter[tuple[str, PartStatus]] = Counter()
        """Failed parts since the run began, by name and status."""
        self._last_detail = ""

    def record(self, trajectories: Iterable[Trajectory]) -> None:
        """Count; raises RewardError when more than the configured share of the recent trajectories failed."""
        for trajectory in trajectories:
            self._recent.append(not trajectory.score.is_valid)
            for name, part in trajectory.score.parts.items():
                if part.status is not PartStatus.OK:
                    self.failed_parts[name, part.status] += 1
                    first_line = part.detail.partition("\n")[0]
                    self._last_detail = f"{name}: {first_line:.200}"
        failed = sum(self._recent)
        if len(self._recent) >= FEWEST and failed > self._max_failed_fraction * len(self._recent):
            parts = ", ".join(f"{name} {status} {count}x" for (name, status), count in self.failed_parts.most_common())
            raise RewardError(
                f"{failed} of the last {len(self._recent)} trajectories could not be scored, more than "
                f"scoring.max_failed_fraction={self._max_failed_fraction:g} allows ({parts}).\n"
                f"The last one: {self._last_detail}\nMend the part, or raise the limit; `--resume` continues the run."
            )
