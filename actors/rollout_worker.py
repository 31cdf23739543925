"""A rollout worker: one vLLM engine that writes completions and takes new weights while it writes.

It never scores and never batches for training. All completions of a prompt run on the same engine, as separate
requests, so that they share the prompt's KV blocks and its features are sent to the engine once.

| waits | for | until | woken by |
|---|---|---|---|
| `generate` | all completions of one prompt | each wrote its end token or hit the limit | the engine |
| `load` | the engine's pause, then the copy | the weights are live, requests in flight included | the engine |
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

from actors.ports import Features, Sampling
from rlsys.models.vllm_plugin.options import EngineOptions, EngineStats, SamplingOptions
from rlsys.types import Completion, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlsys.models.vllm_plugin.client import Sampled
    from rlsys.models.weights import WeightFile


class RolloutWorker:
    """One engine. Call `start` first and `stop` last."""

    def __init__(self, options: EngineOptions) -> None:
        """Reads the tokenizer of `options.model_dir`; the engine itself comes with `start`."""
        from rlsys.models.policy import load_tokenizer, stop_token_ids

        self._options = options
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(options.model_dir)
        self._stop_ids = stop_token_ids(options.model_dir, self._tokenizer)
        self._request_numbers = itertools.count()

    async def start(self) -> None:
        """Start the engine on the weights of the model directory, as version 0."""
        # Here, because the driver imports this module too and has no use for vLLM.
        from rlsys.models.vllm_plugin.client import DnaEngine
        from rlsys.models.vllm_plugin.stats import EngineCounters

        self._counters = EngineCounters()
        self._engine = await DnaEngine.start(self._options, version=0, stat_loggers=[self._counters.logger])

    async def generate(self, prompt: Prompt, sampling: Sampling, features: Features) -> tuple[Completion, ...]:
        """Write `sampling.completions` completions of one prompt; raises RoleError when the engine died."""
        options = SamplingOptions(sampling.max_new_tokens, sampling.temperature, self._stop_ids)
        features_in_slot_order = [features[slot.key] for slot in prompt.slots]
        sampled = await asyncio.gather(
            *(
                self._engine.generate(
                    f"{prompt.problem_id}/{next(self._request_numbers)}", prompt, features_in_slot_order, options
                )
                for _ in range(sampling.completions)
            )
        )
        return tuple(self._completion(one) for one in sampled)

    def _completion(self, sampled: Sampled) -> Completion:
        text = self._tokenizer.decode(sampled.token_ids_T.tolist(), skip_special_tokens=True)
        return Completion(
            token_ids_T=sampled.token_ids_T,
            behavior_logprobs_T=sampled.logprobs_T,
            version_spans=sampled.version_spans,
            text=str(text),
            finish_reason=sampled.finish_reason,
        )

    async def load(self, weights: WeightFile) -> float:
        """Make the published weights live; returns seconds. On an error the old weights keep serving."""
        started = time.monotonic()
        await self._engine.load(weights)
        return time.monotonic() - started

    async def stats(self) -> EngineStats:
        """The engine's counters since its start."""
        return self._counters.snapshot()

    async def stop(self) -> None:
        """End the engine and wait until its processes are gone."""
        await asyncio.to_thread(self._engine.close)
