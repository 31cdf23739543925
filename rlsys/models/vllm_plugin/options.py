"""What an engine is asked for and what it counts, as plain values: importable where vLLM is not wanted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is made of."""

    model_dir: str
    """A policy directory (`rlsys.models.policy`)."""
    max_model_len: int
    """Tokens of a prompt and its completion together."""
    max_num_seqs: int
    """Completions that are written at the same time."""
    dtype: str = "float32"
    max_dna_per_prompt: int = 2
    kv_cache_bytes: int | None = None
    """Memory for keys and values; None: what is left of `gpu_memory_utilization` (GPU only)."""
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    seed: int = 0
    enforce_eager: bool = True
    """False compiles the model first: worth it on a GPU."""
    max_num_batched_tokens: int | None = None
    feature_cache_gib: float = 4.0
    """Features that the engine keeps, so that a prompt's later completions need not send them again."""


@dataclass(frozen=True)
class SamplingOptions:
    """How a completion is drawn: from the whole distribution, so that its log-probabilities are the policy's."""

    max_new_tokens: int
    temperature: float
    """1 is the policy itself; 0 takes the likeliest token (evaluation; log-probabilities are then those at 1)."""
    stop_token_ids: tuple[int, ...]
    seed: int | None = None
    """Makes this one completion reproducible, whatever runs beside it."""


@dataclass(frozen=True)
class EngineStats:
    """Totals since the engine started."""

    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Prompt tokens found there."""
    preemptions: int = 0
    """Requests that lost their KV blocks and were computed again (weight loads preempt all running ones)."""
