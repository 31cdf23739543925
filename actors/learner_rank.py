"""One DeepSpeed rank of the learner: micro-batches in, optimizer steps and published weights out.

It knows packed tokens, advantages and behavior log-probabilities; nothing of problems or rewards. Every public method
is collective: `actors.learner.LearnerGroup`, the only caller, calls it on all ranks in the same order.

Normalisation: the loss of a step is the sum over all its tokens on all ranks, divided by their number N. DeepSpeed
averages gradients over the W ranks, so that each micro-batch contributes `sum * W / N` and neither packing nor
micro-batching nor the number of ranks changes the step.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.ports import Features, Objective
from rlsys.algorithms.losses import TokenLoss, dppo_tv, ppo_clip, reinforce
from rlsys.algorithms.ratios import RatioSums, ratio_sums, same_version_mask
from rlsys.algorithms.sft import nll
from rlsys.config import DppoLoss, LearnerConfig, LoraConfig, Loss, PpoClipLoss, ReinforceLoss
from rlsys.data.packing import MicroBatch
from rlsys.errors import CheckpointError
from rlsys.models.lora import LoraOptions, apply_lora, merged_state_dict
from rlsys.models.packing_check import check_packing
from rlsys.models.policy import load_policy, load_tokenizer, save_policy
from rlsys.models.weights import WeightFile, write_weights

if TYPE_CHECKING:
    from rlsys.models.dna_llm import DnaLlm


@dataclass(frozen=True)
class LearnerOptions:
    """What every rank needs to know."""

    model_dir: str
    config: LearnerConfig
    lora: LoraConfig | None
    seed: int
    weights_dir: str
    """Where `publish` writes; read by the rollout workers of this host."""


@dataclass(frozen=True)
class StepSums:
    """What one rank adds to a step: sums, so that ranks can be added exactly."""

    loss: float
    entropy: float
    tokens: int
    all_tokens: RatioSums
    same_version: RatioSums
    """Only tokens that were sampled by the version that the learner held: their mismatch is numerics, not staleness."""
    gradient_norm: float
    learning_rate: float
    seconds: float


def policy_loss(loss: Loss | None, logprobs_N: Tensor, behavior_logprobs_N: Tensor, advantages_N: Tensor) -> TokenLoss:
    """The configured loss of N tokens; None is the negative log-likelihood of demonstrations."""
    mask_N = torch.ones_like(logprobs_N)
    match loss:
        case None:
            return nll(logprobs_N, mask_N)
        case DppoLoss():
            return dppo_tv(logprobs_N, behavior_logprobs_N, advantages_N, mask_N, delta=loss.delta, tau=loss.tau)
        case PpoClipLoss():
            return ppo_clip(
                logprobs_N,
                behavior_logprobs_N,
                advantages_N,
                mask_N,
                clip_low=loss.epsilon_low,
                clip_high=loss.epsilon_high,
            )
        case ReinforceLoss():
            return reinforce(logprobs_N, behavior_logprobs_N, advantages_N, mask_N)


class LearnerRank:
    """A data-parallel rank. `join` first."""

    def __init__(self, options: LearnerOptions, rank: int) -> None:
        self._options = options
        self._rank = rank
        self._objective: Objective | None = None
        self._version = 0

    def address(self) -> tuple[str, int]:
        """Host and a free port of this process, for the others to meet rank 0 at."""
        with socket.socket() as free:
            free.bind(("", 0))
            return socket.gethostbyname(socket.gethostname()), int(free.getsockname()[1])

    def join(self, host: str, port: int) -> None:
        """Meet the other ranks, load the policy, make the DeepSpeed engine, check that packing is exact."""
        import deepspeed  # here, because the driver imports this module too and has no use for DeepSpeed
        from deepspeed.ops import __compatible_ops__

        config = self._options.config
        # DeepSpeed takes its place in the world from these; each rank sees one GPU, so its local rank is 0.
        os.environ.update(
            MASTER_ADDR=host, MASTER_PORT=str(port), RANK=str(self._rank), LOCAL_RANK="0", WORLD_SIZE=str(config.ranks)
        )
        torch.manual_seed(self._options.seed)
        # Compiled on every CPU start otherwise, and not used: gradients go through gloo.
        __compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if config.gpus else "gloo")
        self._tokenizer = load_tokenizer(self._options.model_dir)
        module = load_policy(self._options.model_dir)
        lora = self._options.lora
        if lora is not None:
            apply_lora(
                module, LoraOptions(r=lora.rank, alpha=lora.alpha, dropout=lora.dropout), seed=self._options.seed
            )
        if config.gradient_checkpointing:
            module.language_model.gradient_checkpointing_enable()
        self._engine = self._make_engine(module)
        self._module: DnaLlm = self._engine.module
        self._device = self._engine.device
        check_packing(self._module, forward=self._engine)

    def _make_engine(self, module: DnaLlm) -> Any:
        import deepspeed

        config = self._options.config
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "zero_optimization": {"stage": config.zero_stage},
            "gradient_clipping": config.gradient_clipping,
            "steps_per_print": 10**9,
        }
        if config.precision == "bf16":
            settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        optimizer = torch.optim.AdamW(trainable, lr=0.0, betas=config.betas, weight_decay=config.weight_decay)
        parameters: Any = trainable  # its annotation says Module
        engine, *_ = deepspeed.initialize(
            model=module, config=settings, model_parameters=parameters, optimizer=optimizer
        )
        return engine

    def enter(self, objective: Objective) -> None:
        """Begin a phase: the optimizer forgets its moments, the version is 0, the weights stay."""
        self._objective = objective
        self._version = 0
        self._engine.optimizer.optimizer.state.clear()

    def step(self, micro_batches: Sequence[MicroBatch], total_tokens: int, *features: Features) -> StepSums:
        """One optimizer step over all micro-batches; `total_tokens` is the number of loss tokens over all ranks."""
        assert self._objective is not None, "enter an objective before the first step"
        started = time.monotonic()
        features_by_key = {key: value for bundle in features for key, value in bundle.items()}
        self._engine.train()
        sums = [self._micro_step(batch, total_tokens, features_by_key) for batch in micro_batches]
        rate = self._objective.learning_rate * min(1.0, (self._version + 1) / max(1, self._objective.warmup_steps))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        self._version += 1
        norm = self._engine.get_global_grad_norm()
        return StepSums(
            loss=sum(one.loss for one in sums),
            entropy=sum(one.entropy for one in sums),
            tokens=sum(one.tokens for one in sums),
            all_tokens=sum((one.all_tokens for one in sums), RatioSums.zero()),
            same_version=sum((one.same_version for one in sums), RatioSums.zero()),
            gradient_norm=float(norm) if norm is not None else 0.0,
            learning_rate=rate,
            seconds=time.monotonic() - started,
        )

    def _micro_step(self, batch: MicroBatch, total_tokens: int, features_by_key: Features) -> StepSums:
        assert self._objective is not None, "enter an objective before the first step"
        targets_N = np.flatnonzero(batch.loss_mask_BT)
        output = self._forward(batch, targets_N, features_by_key)
        behavior_N = self._tensor(batch.behavior_logprobs_BT.reshape(-1)[targets_N])
        advantages_N = self._tensor(batch.advantages_BT.reshape(-1)[targets_N])
        versions_N = self._tensor(batch.versions_BT.reshape(-1)[targets_N])
        token_loss = policy_loss(self._objective.loss, output.logprobs, behavior_N, advantages_N)
        total = token_loss.loss.sum()
        self._engine.backward(total * (self._options.config.ranks / max(1, total_tokens)), scale_wrt_gas=False)
        logprobs_N = output.logprobs.detach()
        mask_N = torch.ones_like(logprobs_N)
        is_rl = self._objective.loss is not None
        same_N = same_version_mask(mask_N, versions_N, self._version)
        return StepSums(
            loss=float(total.detach()),
            entropy=float(output.entropies.sum()),
            tokens=len(targets_N),
            all_tokens=ratio_sums(logprobs_N, behavior_N, mask_N, token_loss.diagnostics.get("clipped"))
            if is_rl
            else RatioSums.zero(),
            same_version=ratio_sums(logprobs_N, behavior_N, same_N) if is_rl else RatioSums.zero(),
            gradient_norm=0.0,
            learning_rate=0.0,
            seconds=0.0,
        )

    def _forward(self, batch: MicroBatch, targets_N: NDArray[np.int64], features_by_key: Features) -> Any:
        """Log-probabilities and entropies of the loss tokens; token t is predicted at t - 1 of its row."""
        assert self._objective is not None, "enter an objective before the first step"
        slots = [(slot.row, slot.start, slot.length) for slot in batch.slots]
        return self._engine(
            self._tensor(batch.input_ids_BT),
            self._tensor(batch.position_ids_BT),
            features=[self._tensor(features_by_key[slot.key]) for slot in batch.slots],
            slots=torch.tensor(slots, dtype=torch.long, device=self._device).reshape(-1, 3),
            predictor_positions=self._tensor(targets_N - 1),
            target_ids=self._tensor(batch.input_ids_BT.reshape(-1)[targets_N]),
            temperature=self._objective.temperature,
        )

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        # Arrays from the object store are read-only and shared; a copy is what torch may safely hold.
        return torch.from_numpy(np.array(array)).to(self._device)

    def publish(self) -> WeightFile | None:
        """Write the weights of the current version for the workers; None on ranks above 0."""
        path = Path(self._options.weights_dir) / f"version-{self._version}.safetensors"
        tensors = merged_state_dict(self._module, gather=self._gather)
        if self._rank:
            _exhaust(tensors)
            return None
        weights = write_weights(path, tensors, version=self._version)
        # A worker that is still loading holds the previous file; older ones nobody needs.
        for old in path.parent.glob("version-*.safetensors"):
            if int(old.stem.removeprefix("version-")) < self._version - 1:
                old.unlink(missing_ok=True)
        return weights

    def save_policy(self, directory: str) -> None:
        """Write the policy as a Hugging Face directory with its tokenizer, adapters merged."""
        save_policy(directory, self._module, self._tokenizer, gather=self._gather, write=self._rank == 0)

    def save(self, directory: str) -> None:
        """Write optimizer, weights and random state below `directory`."""
        state = {"version": self._version, "torch_rng": torch.get_rng_state()}
        self._engine.save_checkpoint(directory, tag="deepspeed", client_state=state, save_latest=False)

    def restore(self, directory: str, objective: Objective) -> None:
        """Go on where `save` was called. Raises CheckpointError when the state is damaged or of another shape."""
        try:
            found, state = self._engine.load_checkpoint(directory, tag="deepspeed")
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{directory}: the learner's state cannot be loaded ({error}); "
                "remove this checkpoint to go on from the one before it"
            ) from error
        if found is None:
            raise CheckpointError(f"{directory}: holds no learner state; remove it to go on from the checkpoint before")
        self._objective = objective
        self._version = int(state["version"])
        torch.set_rng_state(state["torch_rng"])

    def _gather(self, parameters: Sequence[torch.nn.Parameter]) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)


def _exhaust(tensors: Iterator[tuple[str, Tensor]]) -> Mapping[str, None]:
    """Take part in the gathers without keeping what they give."""
    return {name: None for name, _ in tensors}
