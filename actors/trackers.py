"""Where a step's metrics go: `metrics.jsonl` and the Ray dashboard's Prometheus always, Weights & Biases if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.cluster import Cluster
from rlsys.config import Config
from rlsys.evaluation.accuracy import EvaluationResult
from rlsys.report.records import Phase, RunDirectory


class Trackers:
    """Writes metrics everywhere at once."""

    def __init__(self, config: Config, directory: RunDirectory, cluster: Cluster) -> None:
        self._directory = directory
        self._cluster = cluster
        self._wandb: Any = None
        if config.logging.wandb_project is not None:
            import wandb

            self._wandb = wandb.init(
                project=config.logging.wandb_project,
                name=config.name,
                dir=str(directory.path),
                id=config.name,
                resume="allow",
                mode="online" if wandb.api.api_key else "offline",
                config=config.model_dump(mode="json"),
            )

    def log(self, phase: Phase, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step of a phase."""
        self._directory.append_metrics(phase, step, metrics)
        self._cluster.export_metrics(metrics)
        if self._wandb is not None:
            self._wandb.log({f"{phase}/step": step, **metrics})

    def log_evaluation(self, version: int, result: EvaluationResult) -> None:
        """Record an evaluation that was made while training went on, at the version that it is of."""
        self._directory.append_evaluation(Phase.GRPO, version, result.to_dict())
        metrics = {
            "evaluation/version": float(version),
            "evaluation/accuracy": result.accuracy,
            "evaluation/greedy_accuracy": result.greedy_accuracy,
        }
        self._cluster.export_metrics(metrics)
        if self._wandb is not None:
            self._wandb.log({f"{Phase.GRPO}/step": version, **metrics})

    def close(self) -> None:
        """Finish what is open."""
        if self._wandb is not None:
            self._wandb.finish()
