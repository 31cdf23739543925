"""TRL on workload W: what a user would pick instead.

Three trainers: AsyncGRPO beside a vLLM server (trainer on one core, server on the other), and the synchronous
GRPOTrainer with vLLM inside its process or with the generation of transformers (two threads: it takes turns, and may
use both cores for each). All in fp32, without KL, as W says.

TRL was made for GPUs. What a CPU needs is put in its place here and nowhere else, and is as cheap as what it replaces:
see `_patch_colocated_engine`, `_patch_packed_attention` and `_FileTransfer`.
"""

from __future__ import annotations

import importlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tests.benchmarks.measured import Measured, pin, two_cores
from tests.benchmarks.workload import (
    GROUP_SIZE,
    LEARNING_RATE,
    MAX_MODEL_TOKENS,
    MAX_NEW_TOKENS,
    PROMPTS_PER_STEP,
    TRAJECTORIES_PER_STEP,
    even_fraction,
    make_text_model,
    prompt_texts,
)

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "none",
    "CUDA_VISIBLE_DEVICES": "",
}
"""For the process of a TRL part. No plug-ins: rlsys's own would change how vLLM multiplies in TRL's engine."""

MICRO_BATCH = 32
"""Trajectories in one forward pass: the fastest of those tried for TRL."""
KV_CACHE_BYTES = 256 << 20


def even_reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> Any:
    """W's reward in the form that TRL calls."""
    return [even_fraction(list(ids)) for ids in completion_ids]


def run_synchronous(work: Path, steps: int, warmup: int, engine: Literal["vllm", "transformers"]) -> Measured:
    """GRPOTrainer, its engine inside the process."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    os.sched_setaffinity(0, two_cores())
    torch.set_num_threads(2)
    model = str(make_text_model(work / "text"))
    more: dict[str, Any] = {}
    if engine == "vllm":
        _patch_colocated_engine()
        more = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": MAX_MODEL_TOKENS}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=even_reward,
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_dict({"prompt": prompt_texts(PROMPTS_PER_STEP * (steps + warmup))}),
        args=GRPOConfig(**_common(work, steps + warmup), beta=0.0, model_init_kwargs={"dtype": "float32"}, **more),
    )
    generating = _Stopwatch(trainer, "_generate_single_turn")
    seen = _train(trainer)
    step_seconds = seen.step_seconds(warmup)
    generate_seconds = generating.seconds[warmup:]
    lengths = seen.values("completions/mean_length", warmup)
    tokens = sum(lengths) * TRAJECTORIES_PER_STEP
    generating_share = sum(generate_seconds) / sum(step_seconds)
    return Measured(
        step_seconds=step_seconds,
        generated_tokens=tokens,
        trained_tokens=tokens,
        completion_tokens_mean=sum(lengths) / len(lengths),
        learner_idle=generating_share,
        rollout_idle=1 - generating_share,
        bottleneck="they take turns",
        staleness_mean=0.0,
        staleness_max=0.0,
        thrown_away_tokens=0.0,
        details={"generate_seconds": sum(generate_seconds) / len(generate_seconds)},
    )


def run_asynchronous(work: Path, steps: int, warmup: int) -> Measured:
    """AsyncGRPOTrainer and a vLLM server, a core each; its staleness limit is TRL's default."""
    import torch
    import trl.chat_template_utils
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.async_grpo.async_grpo_config import AsyncGRPOConfig
    from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer

    model = str(make_text_model(work / "text"))
    trainer_core, server_core = two_cores()
    pin(os.getpid(), server_core)
    with _server(model, work) as url:
        pin(os.getpid(), trainer_core)
        torch.set_num_threads(1)
        _patch_packed_attention()
        tokenizer = AutoTokenizer.from_pretrained(model)
        # TRL reads answers back with a template that it finds by the chat template, and does not know this one.
        tokenizer.response_template = trl.chat_template_utils.llama3_template
        prompts = [[{"role": "user", "content": text}] for text in prompt_texts(PROMPTS_PER_STEP * (steps + warmup))]
        transfer: Any = _FileTransfer(url)
        trainer = AsyncGRPOTrainer(
            model=model,
            reward_funcs=even_reward,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            args=AsyncGRPOConfig(
                **_common(work, steps + warmup), dtype="float32", vllm_server_base_url=url, token_budget=-1
            ),
            weight_transfer=transfer,
        )
        seen = _train(trainer)
    step_seconds = seen.step_seconds(warmup)
    trained = sum(seen.values("batch/trained_tokens_per_step", warmup))
    samples = sum(seen.values("batch/samples_per_step", warmup))
    generation_rates = seen.values("rollout/generated_tok_s", warmup)
    waited = sum(seen.values("perf/rollout_wait_s", warmup)) / sum(step_seconds)
    staleness = seen.values("sample/staleness_mean", warmup)
    return Measured(
        step_seconds=step_seconds,
        generated_tokens=sum(generation_rates) / len(generation_rates) * sum(step_seconds),
        trained_tokens=trained,
        completion_tokens_mean=trained / samples,
        learner_idle=waited,
        bottleneck="learner" if waited < 0.05 else "rollout",
        staleness_mean=sum(staleness) / len(staleness),
        staleness_max=max(seen.values("sample/staleness_max", warmup)),
        # TRL counts samples; their tokens are those of an average one.
        thrown_away_tokens=sum(seen.values("sample/dropped_stale_total", warmup)) * trained / samples,
        details={
            name: sum(values) / len(values)
            for name in ("perf/fwd_bwd_s", "perf/optimizer_s", "perf/weight_sync_s", "batch/packing_ratio")
            if (values := seen.values(name, warmup))
        },
    )


def _common(work: Path, steps: int) -> dict[str, Any]:
    """What both configurations share."""
    return {
        "output_dir": str(work / "trl"),
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": TRAJECTORIES_PER_STEP // MICRO_BATCH,
        "num_generations": GROUP_SIZE,
        "max_completion_length": MAX_NEW_TOKENS,
        "temperature": 1.0,
        "use_cpu": True,
        "bf16": False,  # TRL's default
        "gradient_checkpointing": False,  # TRL's default is True, which costs a third more
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


class _Seen:
    """What the trainer told of its steps."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        """When training began, and when each step ended."""
        self.logs: list[dict[str, Any]] = []

    def step_seconds(self, warmup: int) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.marks)][warmup:]

    def values(self, name: str, warmup: int) -> list[float]:
        """One for each step after the warm-up in which the trainer logged it."""
        steps = [log for log in self.logs if "loss" in log]
        return [float(log[name]) for log in steps[warmup:] if log.get(name) is not None]


def _train(trainer: Any) -> _Seen:
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    seen = _Seen()

    class Listener(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            seen.marks.append(time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.marks.append(time.monotonic())

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            seen.logs.append(dict(logs or {}))

    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(Listener())
    trainer.train()
    return seen


class _Stopwatch:
    """Times every call of a method."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds: list[float] = []
        method = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.monotonic()
            try:
                return method(*arguments, **named)
            finally:
                self.seconds.append(time.monotonic() - started)

        setattr(owner, name, timed)


def _patch_colocated_engine() -> None:
    """Let TRL start vLLM in its process on a CPU, and copy weights into it.

    vLLM's packed products empty the weights that TRL would copy into; the plain product is as fast here.
    """
    import torch
    import vllm

    for_cpu: dict[str, Any] = {
        "distributed_executor_backend": "uni",
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }

    def keep(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    def engine(**arguments: Any) -> Any:
        arguments.pop("gpu_memory_utilization")
        return vllm.LLM(**{**arguments, **for_cpu})

    _replace("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", keep)
    _replace("trl.generation.vllm_generation", "LLM", engine)


def _patch_packed_attention() -> None:
    """Give TRL's packing, which calls FlashAttention 3 of CUDA, an attention of PyTorch with that signature."""
    from tests.benchmarks.trl_attention import CpuFlashAttention

    _replace("trl.experimental.async_grpo.packing", "_flash_attn", CpuFlashAttention)
    # Asks CUDA for the name of the device.
    _replace("trl.experimental.async_grpo.async_grpo_trainer", "get_peak_flops_per_device", lambda *_: None)


def _replace(module: str, name: str, value: object) -> None:
    found = importlib.import_module(module)
    assert hasattr(found, name), f"{module} has no {name} any more"
    setattr(found, name, value)


class _FileTransfer:
    """TRL's weight transfer by a file in shared memory: its own is NCCL's."""

    def __init__(self, url: str) -> None:
        from trl.experimental.async_grpo.vllm_client import VLLMClient

        self._server = VLLMClient(url)
        self._path = Path(f"/dev/shm/trl-weights-{os.getpid()}.safetensors")

    def init_weight_transfer(self) -> None:
        self._server.wait_for_server_ready()
        self._server.init_weight_transfer_engine({})

    def pause(self) -> None:
        self._server.pause()

    def resume(self) -> None:
        self._server.resume()

    def send_weights(self, tensors: Iterator[tuple[str, Any]]) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors}, self._path)
        self._server.start_weight_update()
        self._server.update_weights({"path": str(self._path)})
        self._server.finish_weight_update()

    def destroy(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def _server(model: str, work: Path) -> Generator[str]:
    """A vLLM server on the core that this process is on now; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model": model,
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "block-size": 32,
        "max-model-len": MAX_MODEL_TOKENS,
        "max-num-seqs": TRAJECTORIES_PER_STEP,
        "max-num-batched-tokens": 4096,
        "kv-cache-memory-bytes": KV_CACHE_BYTES,
        "distributed-executor-backend": "uni",
        "weight-transfer-config": '{"backend": "trl_file"}',
        "logprobs-mode": "processed_logprobs",
    }
    # TRL seeds each request, and this vLLM's CPU sampler dies of a seeded request whose prompt is chunked.
    flags = ["--enforce-eager", "--no-enable-chunked-prefill", "--disable-uvicorn-access-log"]
    command = [sys.executable, "-m", "tests.benchmarks.trl_server", *flags]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with (work / "trl_server.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_SERVER_DEV_MODE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
