"""One vLLM engine as a rollout worker uses it: start, generate with token versions, take new weights in flight, close.

The sequence of calls of a weight update, and what breaks without each (all of it happens silently):

| call | why |
|---|---|
| `pause_generation(keep, clear_cache=False)` | a step during the copy mixes versions; `clear_cache` loses features |
| start / update / finish(version) | copies the weights, then labels the tokens that follow |
| `reset_prefix_cache(reset_running_requests=True)` | all requests would go on with the old weights' keys and values |
| `reset_encoder_cache()` | DNA rows that the old projector made would be used again |
| `resume_generation()` | also after a refused update: the old weights keep serving |

Invariant: each token's log-probability is that of the version in its span, at the sampling temperature.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from vllm import AsyncEngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.exceptions import VLLMClientError
from vllm.model_executor.models.registry import ModelRegistry
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from rlsys.data.prompts import NUM_MARKERS
from rlsys.errors import CheckpointError, ConfigError, RoleError, RoleLostError
from rlsys.models.vllm_plugin import MODEL_ARCHITECTURE, WEIGHT_TRANSFER_BACKEND, register
from rlsys.models.vllm_plugin.options import EngineOptions, SamplingOptions
from rlsys.models.vllm_plugin.processing import MODALITY
from rlsys.models.weights import WeightFile
from rlsys.types import FinishReason, FloatArray, IntArray, Prompt, VersionSpan

# Multiples of 32 are what vLLM's CPU attention takes; its default of 128 never caches prompts shorter than that.
_CPU_BLOCK_SIZE = 32
# vLLM kills what has not ended by then. On CPU that is the rule, and an engine has nothing to save.
_GRACE_SECONDS = 1.0
# vLLM's validation errors print the whole configuration.
_LONGEST_REASON = 300


class Sampled(NamedTuple):
    """What the engine wrote for one request."""

    token_ids_T: IntArray
    """A stop token included, if it ended the completion."""
    logprobs_T: FloatArray
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason


class _FeaturesMissingError(Exception):
    """A key was sent without its features, and the engine does not have them (any more)."""


def engine_args(options: EngineOptions) -> AsyncEngineArgs:
    """Arguments of vLLM for an engine of a policy."""
    arguments: dict[str, Any] = {
        "model": options.model_dir,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "limit_mm_per_prompt": {MODALITY: options.max_dna_per_prompt},
        "skip_mm_profiling": True,
        "mm_processor_cache_gb": options.feature_cache_gib,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "tensor_parallel_size": options.tensor_parallel_size,
        "seed": options.seed,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        # Stop tokens and sampling come from the request alone, not from files beside the weights.
        "generation_config": "vllm",
        "weight_transfer_config": WeightTransferConfig(backend=WEIGHT_TRANSFER_BACKEND),
        "disable_log_stats": False,
    }
    if options.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
    if options.tensor_parallel_size == 1:
        arguments["distributed_executor_backend"] = "uni"
    if current_platform.is_cpu():
        arguments["block_size"] = _CPU_BLOCK_SIZE
    return AsyncEngineArgs(**arguments)


class DnaEngine:
    """A running engine. `close` it: its process holds the memory of the weights until then."""

    def __init__(self, engine: AsyncLLM) -> None:
        """Use `start`."""
        self.engine = engine
        self._sent_keys: set[str] = set()
        self._load_lock = asyncio.Lock()

    @classmethod
    async def start(
        cls, options: EngineOptions, version: int, stat_loggers: Sequence[Callable[..., Any]] | None = None
    ) -> DnaEngine:
        """Start an engine on the weights of the policy directory, which are policy version `version`.

        The process environment must hold `VLLM_ENABLE_V1_MULTIPROCESSING=0` on CPU (an engine is two more processes
        otherwise) and `OMP_NUM_THREADS`. Raises CheckpointError or ConfigError when the engine cannot start.
        """
        register()
        if MODEL_ARCHITECTURE not in ModelRegistry.models:
            raise ConfigError("vLLM does not know the DNA-LLM: the plug-in did not register; is rlsys installed?")
        if WEIGHT_TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:  # pyright: ignore[reportPrivateUsage]
            raise ConfigError("vLLM does not know rlsys's weight transfer: the plug-in did not register")
        if not (Path(options.model_dir) / "config.json").is_file():
            raise CheckpointError(
                f"{options.model_dir}: holds no config.json; an engine starts from a policy directory"
            )
        try:
            # Blocking, for as long as the weights take: nothing else happens in a worker that has no engine yet.
            engine = AsyncLLM.from_engine_args(engine_args(options), stat_loggers=cast(Any, stat_loggers))
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise ConfigError(f"the engine for {options.model_dir} did not start: {reason}") from error
        await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        await engine.update_weight_version(str(version))
        return cls(engine)

    async def generate(
        self, request_id: str, prompt: Prompt, features: Sequence[NDArray[Any]], sampling: SamplingOptions
    ) -> Sampled:
        """Write one completion. A group is G calls with G request ids, on one engine.

        `features` are [S, E] in slot order. They travel to the engine once for each key; later requests name the key,
        and send again when the engine has dropped it. To cancel, cancel the task. Raises RoleError when the engine
        refused the request or was closed, RoleLostError when it died.
        """
        assert len(features) == len(prompt.slots), f"{len(features)} features for {len(prompt.slots)} slots"
        for slot, rows in zip(prompt.slots, features, strict=True):
            assert len(rows) + NUM_MARKERS == slot.length, f"{len(rows)} feature rows in a slot of {slot.length} tokens"
        keys = [slot.key for slot in prompt.slots]
        known = self._sent_keys.intersection(keys)
        self._sent_keys.update(keys)  # at once: the rest of the group is on its way; who is too early sends again
        try:
            try:
                output = await self._run(request_id, prompt, features, sampling, known)
            except _FeaturesMissingError:
                output = await self._run(request_id, prompt, features, sampling, known=set())
        except (EngineGenerateError, _FeaturesMissingError) as error:
            raise RoleError(f"request {request_id}: the engine refused it ({error.__cause__ or error})") from error
        except (VLLMClientError, ValueError) as error:  # too long, too many sequences, a bad temperature
            raise RoleError(f"request {request_id}: the engine refused it ({error})") from error
        except EngineDeadError as error:
            raise RoleLostError(f"request {request_id}: the engine died; its log says why") from error
        return _to_sampled(request_id, output)

    async def _run(
        self,
        request_id: str,
        prompt: Prompt,
        features: Sequence[NDArray[Any]],
        sampling: SamplingOptions,
        known: set[str],
    ) -> CompletionOutput:
        final: RequestOutput | None = None
        engine_prompt = to_engine_prompt(prompt, features, known)
        try:
            async for output in self.engine.generate(engine_prompt, to_sampling_params(sampling), request_id):
                final = output
        except EngineGenerateError as error:
            if "Cache miss" in str(error.__cause__):
                raise _FeaturesMissingError(str(error.__cause__)) from error
            raise
        assert final is not None, "vLLM ends a request with an output"
        if final.outputs[0].finish_reason == "error":
            # The front end took the features for sent, and the engine does not have them; it has forgotten them now.
            raise _FeaturesMissingError("the engine reported an internal error")
        return final.outputs[0]

    async def load(self, weight_file: WeightFile) -> None:
        """Make a policy version live, in requests under way too: the tokens that they wrote stay, with their version.

        On any refusal (CheckpointError: damaged file, or another policy's) the old weights go on serving, under their
        old version. Raises RoleLostError when the engine died.
        """
        async with self._load_lock:
            try:
                await self.engine.pause_generation(mode="keep", clear_cache=False)
                try:
                    await self._update(weight_file)
                finally:
                    await self.engine.resume_generation()
            except EngineDeadError as error:
                raise RoleLostError(f"the engine died while loading policy version {weight_file.version}") from error

    async def _update(self, weight_file: WeightFile) -> None:
        await self.engine.start_weight_update()
        try:
            await self.engine.update_weights(WeightTransferUpdateRequest(update_info=weight_file._asdict()))
        except EngineDeadError:
            raise
        except Exception as error:  # vLLM rebuilds a worker's exception as a bare Exception
            reason = str(error).strip()
            raise CheckpointError(f"the engine refused policy version {weight_file.version}: {reason}") from error
        await self.engine.finish_weight_update(str(weight_file.version))
        if not await self.engine.reset_prefix_cache(reset_running_requests=True):
            raise RoleLostError(f"policy version {weight_file.version}: the engine kept stale keys and values")
        await self.engine.reset_encoder_cache()

    def close(self) -> None:
        """End the engine's processes; blocks for a second or two. May be called again."""
        self.engine.shutdown(timeout=_GRACE_SECONDS)


def to_engine_prompt(prompt: Prompt, features: Sequence[NDArray[Any]], known: set[str]) -> Any:
    """Put a prompt into vLLM's form; the features of `known` keys are left out."""
    engine_prompt: dict[str, Any] = {"prompt_token_ids": list(prompt.token_ids)}
    if prompt.slots:
        keys = [slot.key for slot in prompt.slots]
        items = [
            None if key in known else torch.from_numpy(np.array(rows)) for key, rows in zip(keys, features, strict=True)
        ]
        engine_prompt |= {"multi_modal_data": {MODALITY: items}, "multi_modal_uuids": {MODALITY: keys}}
    return engine_prompt


def to_sampling_params(sampling: SamplingOptions) -> SamplingParams:
    """Put sampling options into vLLM's form: the whole distribution, the sampled token's probability."""
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=1.0,
        top_k=-1,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # the stop tokens are those given, and no others
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def to_version_spans(spans: Sequence[Any], num_tokens: int) -> tuple[VersionSpan, ...]:
    """Turn vLLM's spans (version label, start, end) into ours; they cover all `num_tokens` tokens in order."""
    ours = tuple(VersionSpan(int(span.version), span.start, span.end) for span in spans)
    edges = [0, *(span.end for span in ours)]
    assert [span.start for span in ours] == edges[:-1], f"version spans {ours} leave gaps"
    assert edges[-1] == num_tokens, f"version spans {ours} for {num_tokens} tokens"
    return ours


def _to_sampled(request_id: str, output: CompletionOutput) -> Sampled:
    if output.finish_reason == "abort":
        raise RoleError(f"request {request_id}: the engine gave it up")
    token_ids = list(output.token_ids)
    assert output.logprobs is not None, "log-probabilities were asked for"
    positions = cast("Sequence[dict[int, Any]]", output.logprobs)
    logprobs = [position[token].logprob for position, token in zip(positions, token_ids, strict=True)]
    return Sampled(
        token_ids_T=np.array(token_ids, dtype=np.int64),
        logprobs_T=np.array(logprobs, dtype=np.float32),
        version_spans=to_version_spans(output.weight_versions or (), len(token_ids)),
        finish_reason=FinishReason(output.finish_reason),
    )
