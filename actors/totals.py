"""Running totals of a run that its summary reports; a resumed run goes on counting from its checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from rlsys.pipeline.waits import Role, WaitTimes


@dataclass
class Totals:
    """Sums over GRPO steps, but for `wall_seconds`."""

    wall_seconds: float = 0.0
    """Of the whole run, up to the checkpoint that this sitting began with."""
    steps: int = 0
    grpo_seconds: float = 0.0
    staleness_sum: float = 0.0
    """Of the steps' mean staleness."""
    staleness_max: float = 0.0
    loads: int = 0
    load_seconds: float = 0.0
    mismatch_sum: float = 0.0
    """Of the steps' mean |log-probability difference| at equal version, where a step had such tokens."""
    mismatch_steps: int = 0
    trained_trajectories: int = 0
    learner_busy_seconds: float = 0.0
    learner_seconds: float = 0.0
    rollout_busy_seconds: float = 0.0
    rollout_seconds: float = 0.0

    def add_step(self, metrics: Mapping[str, float], seconds: float, times: WaitTimes) -> None:
        """Count one GRPO step: its metrics, its wall time and the roles' times in it."""
        self.steps += 1
        self.grpo_seconds += seconds
        self.staleness_sum += metrics["staleness/mean"]
        self.staleness_max = max(self.staleness_max, metrics["staleness/max"])
        self.trained_trajectories += int(metrics["throughput/trained_trajectories"])
        if "time/weight_load_seconds" in metrics:
            self.loads += 1
            self.load_seconds += metrics["time/weight_load_seconds"]
        if "train/mismatch_abs_mean" in metrics:
            self.mismatch_steps += 1
            self.mismatch_sum += metrics["train/mismatch_abs_mean"]
        self.learner_busy_seconds += times.busy_seconds[Role.LEARNER]
        self.learner_seconds += times.member_seconds[Role.LEARNER]
        self.rollout_busy_seconds += times.busy_seconds[Role.ROLLOUT_WORKER]
        self.rollout_seconds += times.member_seconds[Role.ROLLOUT_WORKER]

    def to_dict(self) -> dict[str, float]:
        """Plain values for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
