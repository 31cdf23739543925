"""What a run will place where, and the memory it needs: the text of `--dry-run`.

Memory is counted from the weights on disk: parameters N, of which M are trained. Activations, which depend on the
batch, and each process's own libraries (0.4 to 1 GB) are not in it.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from actors.roles import demands
from actors.session import Prepared
from rlsys.config import Config
from rlsys.data.prompts import PromptRenderer
from rlsys.pipeline.staleness import make_policy
from rlsys.types import Problem

GB = 2**30
PROMPTS_MEASURED = 200


@dataclass(frozen=True)
class Need:
    """Memory of one process of a role, in bytes, with its make-up."""

    num_bytes: float
    made_of: str


def render_plan(config: Config, prepared: Prepared) -> str:
    """The plan as text."""
    needs = _needs(config, prepared)
    lines = [
        f"{config.name}: nothing was started (--dry-run)",
        "",
        f"{'role':<18} {'processes':>9} {'CPUs each':>10} {'GPUs each':>10} {'memory each':>12}  made of",
    ]
    for one in demands(config):
        need = needs[one.role]
        lines.append(
            f"{one.role:<18} {one.processes:>9} {one.each.cpus:>10g} {one.each.gpus:>10g} "
            f"{need.num_bytes / GB:>9.2f} GB  {need.made_of}"
        )
    cpus = sum(one.processes * one.each.cpus for one in demands(config))
    gpus = sum(one.processes * one.each.gpus for one in demands(config))
    total = sum(needs[one.role].num_bytes * one.processes for one in demands(config))
    splits = ", ".join(f"{len(problems)} {name}" for name, problems in prepared.task.splits.items())
    dropped = "".join(f", {number} {name.replace('_', ' ')}" for name, number in prepared.task.counts.items() if number)
    grpo = config.grpo
    policy = make_policy(grpo.order, grpo.max_staleness, grpo.groups_per_step)
    lines += [
        "",
        f"in all             {cpus:g} CPUs, {gpus:g} GPUs, {total / GB:.2f} GB before activations",
        f"problems           {splits}{dropped}",
        f"prompts            {_prompt_lengths(prepared.renderer, prepared.task.splits['train'])}",
        f"warm start         {config.sft.steps} steps of {config.sft.batch_size}"
        if config.sft
        else "warm start         none",
        f"GRPO               {grpo.steps} steps of {grpo.groups_per_step} groups of {grpo.group_size}; "
        f"{policy.required_capacity} groups admitted at most ({grpo.order.kind}, staleness at most {policy.bound})",
        f"algorithm          {grpo.advantage.kind} advantages, {grpo.loss.kind} loss, {_extras(config)}",
    ]
    return "\n".join(lines)


def _extras(config: Config) -> str:
    """What is configured beside advantage and loss."""
    grpo = config.grpo
    return ", ".join(
        [
            f"{grpo.aggregation} aggregation",
            *([f"{grpo.correction.kind} correction"] if grpo.correction else []),
            *([f"{grpo.kl.weight:g} x {grpo.kl.estimator} KL to the warm start"] if grpo.kl else []),
            *([f"{grpo.entropy_weight:g} x entropy"] if grpo.entropy_weight else []),
            *(["curriculum"] if grpo.curriculum else []),
            *(["streaming"] if grpo.streaming else []),
        ]
    )


def _needs(config: Config, prepared: Prepared) -> dict[str, Need]:
    parameters = num_parameters(prepared.model_dir)
    encoder = num_parameters(Path(prepared.encoder.path))
    learner, rollout = config.learner, config.rollout
    bytes_each = 2 if learner.precision == "bf16" else 4
    master = 4 if learner.precision == "bf16" else 0
    trained = parameters if config.policy.lora is None else 0.02 * parameters
    shards = {1: (1, 1), 2: (1, learner.ranks), 3: (learner.ranks, learner.ranks)}[learner.zero_stage]
    weights, gradients = bytes_each * parameters / shards[0], 4 * trained / shards[1]
    optimizer = (8 + master) * trained / learner.ranks
    kv = f"{rollout.kv_cache_gb:g} GB KV cache" if rollout.kv_cache_gb is not None else "KV cache from free GPU memory"
    return {
        "learner": Need(
            weights + gradients + optimizer,
            f"{_millions(parameters)} parameters: weights {weights / GB:.2f}, gradients {gradients / GB:.2f}, "
            f"AdamW {optimizer / GB:.2f} GB (ZeRO-{learner.zero_stage}, {learner.precision})",
        ),
        "rollout worker": Need(
            bytes_each * parameters / max(1, rollout.gpus) + (rollout.kv_cache_gb or 0) * GB, f"weights, {kv}"
        ),
        "embedding service": Need(
            4 * encoder + config.embedding.cache_gb * GB,
            f"{_millions(encoder)} parameters, cache up to {config.embedding.cache_gb:g} GB",
        ),
        "reward scorer": Need(0, f"parts {', '.join(config.rewards)}"),
    }


def num_parameters(directory: Path) -> int:
    """Parameters in a directory's safetensors files, read from their headers; 0 where there are none."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for axis in entry["shape"]:
                    size *= axis
                total += size
    return total


def _prompt_lengths(renderer: PromptRenderer, problems: tuple[Problem, ...]) -> str:
    lengths = sorted(len(renderer.render(problem).token_ids) for problem in problems[:PROMPTS_MEASURED])
    return (
        f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]} "
        f"(the first {len(lengths)} training problems)"
    )


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"
