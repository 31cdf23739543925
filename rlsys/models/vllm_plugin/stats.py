"""Counters of one engine, pushed by vLLM after each of its steps and read without asking the engine process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from rlsys.models.vllm_plugin.options import EngineStats


class EngineCounters:
    """Keeps the totals; `logger` is what the engine wants in `stat_loggers`."""

    def __init__(self) -> None:
        self._stats = EngineStats()

    def snapshot(self) -> EngineStats:
        """The totals now."""
        return self._stats

    def logger(self, vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        """Make the logger that feeds these counters."""
        return _Logger(self)

    def add(self, queries: int, hits: int, preemptions: int) -> None:
        """Add one engine step's deltas."""
        old = self._stats
        self._stats = replace(
            old,
            prefix_cache_queries=old.prefix_cache_queries + queries,
            prefix_cache_hits=old.prefix_cache_hits + hits,
            preemptions=old.preemptions + preemptions,
        )


class _Logger(StatLoggerBase):
    def __init__(self, counters: EngineCounters) -> None:
        self._counters = counters

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        prefix = scheduler_stats.prefix_cache_stats if scheduler_stats is not None else None
        self._counters.add(
            queries=prefix.queries if prefix is not None else 0,
            hits=prefix.hits if prefix is not None else 0,
            preemptions=iteration_stats.num_preempted_reqs if iteration_stats is not None else 0,
        )

    def log(self) -> None:
        """Nothing to print."""

    def log_engine_initialized(self) -> None:
        """Nothing to print."""
