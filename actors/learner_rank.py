"""One DeepSpeed rank of the learner: micro-batches in, optimizer steps and published weights out.

It knows packed tokens, advantages and behavior log-probabilities; nothing of problems or rewards. Every public method
is collective: `actors.learner.LearnerGroup`, the only caller, calls it on all ranks in the same order.

Normalisation: every token carries its weight in the loss of the step, which is the plain sum over all tokens on all
ranks. DeepSpeed averages gradients over the W ranks, so that each micro-batch contributes `W * sum`, and neither
packing nor micro-batching nor the number of ranks changes the step, nor whether it comes whole or in parts.
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
from rlsys.algorithms.ratios import RatioSums, SumsByStaleness, add_sums, ratio_sums
from rlsys.algorithms.sft import nll
from rlsys.algorithms.tokens import PolicyTokens
from rlsys.config import LearnerConfig, LoraConfig
from rlsys.data.packing import MicroBatch
from rlsys.errors import CheckpointError
from rlsys.models.lora import LoraOptions, apply_lora, merged_state_dict
from rlsys.models.packed_attention import PACKED
from rlsys.models.packing_check import check_packing, packed_arguments
from rlsys.models.policy import load_policy, load_tokenizer, save_policy
from rlsys.models.reference import ReferencePolicy
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


REFERENCE_FILE = "reference.pt"


@dataclass(frozen=True)
class PartSums:
    """What one rank adds to a step with some micro-batches: sums, so that ranks and parts can be added exactly."""

    loss: float
    entropy: float
    kl: float | None
    """Of the current to the reference policy; None without a KL penalty."""
    tokens: int
    ratios: SumsByStaleness
    """For no tokens of a policy loss: empty."""
    seconds: float


@dataclass(frozen=True)
class StepEnd:
    """What the optimizer did."""

    gradient_norm: float
    was_applied: bool
    """False where DeepSpeed left the weights as they were, because the gradient was not finite."""
    learning_rate: float
    seconds: float


class LearnerRank:
    """A data-parallel rank. `join` first."""

    def __init__(self, options: LearnerOptions, rank: int) -> None:
        self._options = options
        self._rank = rank
        self._objective: Objective | None = None
        self._reference: ReferencePolicy | None = None
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
        module = load_policy(self._options.model_dir, attn_implementation=PACKED)
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
        trainable = _trainable(module)
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
        self._take(objective)
        self._version = 0
        self._engine.optimizer.optimizer.state.clear()

    def _take(self, objective: Objective) -> None:
        self._objective = objective
        needed = objective.policy is not None and objective.policy.needs_reference
        self._reference = ReferencePolicy(_trainable(self._module), self._gather_to_write) if needed else None

    @torch.no_grad()
    def step_log_ratios(self, micro_batches: Sequence[MicroBatch], *features: Features) -> NDArray[np.float64]:
        """What a loss that looks at the whole step needs of these micro-batches (`PolicyObjective.step_log_ratios`)."""
        policy = self._current_objective.policy
        assert policy is not None, "demonstrations need no ratios"
        by_key = _merge(features)
        self._engine.eval()
        ratios = [policy.step_log_ratios(self._tokens(batch, self._forward(batch, by_key))) for batch in micro_batches]
        return torch.cat(ratios).cpu().numpy()

    @torch.no_grad()
    def probe(self, micro_batches: Sequence[MicroBatch], *features: Features) -> RatioSums:
        """The sums over the tokens of these micro-batches that the version held here sampled; nothing is trained."""
        by_key = _merge(features)
        self._engine.eval()
        sums = [self._ratio_sums(batch, self._tokens(batch, self._forward(batch, by_key))) for batch in micro_batches]
        return add_sums(sums).get(0, RatioSums.zero())

    def accumulate(self, micro_batches: Sequence[MicroBatch], threshold: float | None, *features: Features) -> PartSums:
        """Add the gradients of micro-batches to the next step's; `threshold` is for a loss that asked for one."""
        started = time.monotonic()
        by_key = _merge(features)
        references = self._reference_logprobs(micro_batches, by_key)
        self._engine.train()
        sums = [
            self._accumulate_one(batch, reference_N, threshold, by_key)
            for batch, reference_N in zip(micro_batches, references, strict=True)
        ]
        return add_parts(sums, seconds=time.monotonic() - started)

    def _reference_logprobs(self, micro_batches: Sequence[MicroBatch], by_key: Features) -> list[Tensor | None]:
        if self._reference is None:
            return [None] * len(micro_batches)
        self._engine.eval()
        with self._reference.in_place(), torch.no_grad():
            return [self._forward(batch, by_key).logprobs for batch in micro_batches]

    def _accumulate_one(
        self, batch: MicroBatch, reference_N: Tensor | None, threshold: float | None, by_key: Features
    ) -> PartSums:
        policy = self._current_objective.policy
        output = self._forward(batch, by_key)
        tokens = self._tokens(batch, output)
        if policy is None:
            token_loss = nll(tokens.logprobs, tokens.mask)
        else:
            entropies = output.entropies if policy.needs_entropies else None
            token_loss = policy(tokens, reference_logprobs=reference_N, entropies=entropies, threshold=threshold)
        total = (token_loss.loss * self._tensor(batch.weights_N)).sum()
        self._engine.backward(total * self._options.config.ranks, scale_wrt_gas=False)
        diagnostics = token_loss.diagnostics
        return PartSums(
            loss=float(total.detach()),
            entropy=float(output.entropies.detach().sum()),
            kl=float(diagnostics["kl"].sum()) if "kl" in diagnostics else None,
            tokens=len(batch.loss_tokens_N),
            ratios=self._ratio_sums(batch, tokens, clipped=diagnostics["clipped"], masked=diagnostics.get("masked"))
            if policy is not None
            else {},
            seconds=0.0,
        )

    def _ratio_sums(
        self, batch: MicroBatch, tokens: PolicyTokens, *, clipped: Tensor | None = None, masked: Tensor | None = None
    ) -> SumsByStaleness:
        staleness = self._version - self._tensor(batch.versions_N)
        return ratio_sums(
            tokens.logprobs, tokens.behavior_logprobs, tokens.mask, staleness, clipped=clipped, masked=masked
        )

    def _tokens(self, batch: MicroBatch, output: Any) -> PolicyTokens:
        return PolicyTokens(
            logprobs=output.logprobs,
            behavior_logprobs=self._tensor(batch.behavior_logprobs_N),
            advantages=self._tensor(batch.advantages_N),
            mask=torch.ones_like(output.logprobs),
            sequences=self._tensor(batch.sequences_N),
        )

    def step(self) -> StepEnd:
        """One optimizer step with the gradients that were accumulated; the version goes on in any case."""
        started = time.monotonic()
        objective = self._current_objective
        rate = objective.learning_rate * min(1.0, (self._version + 1) / max(1, objective.warmup_steps))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        self._version += 1
        norm = self._engine.get_global_grad_norm()
        return StepEnd(
            gradient_norm=float(norm) if norm is not None else 0.0,
            was_applied=self._engine.was_step_applied(),
            learning_rate=rate,
            seconds=time.monotonic() - started,
        )

    @property
    def _current_objective(self) -> Objective:
        assert self._objective is not None, "enter an objective before the first step"
        return self._objective

    def _forward(self, batch: MicroBatch, by_key: Features) -> Any:
        """Log-probabilities and entropies of the loss tokens."""
        objective = self._current_objective
        arguments = packed_arguments(batch, self._device)
        return self._engine(
            arguments.pop("input_ids"),
            arguments.pop("position_ids"),
            features=[self._tensor(by_key[slot.key]) for slot in batch.slots],
            temperature=objective.temperature,
            entropy_gradient=objective.policy is not None and objective.policy.needs_entropies,
            **arguments,
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
        if self._reference is not None and self._rank == 0:
            self._reference.save(Path(directory) / REFERENCE_FILE)

    def restore(self, directory: str, objective: Objective) -> None:
        """Go on where `save` was called. Raises CheckpointError when the state is damaged or of another shape."""
        try:
            found, state = self._engine.load_checkpoint(directory, tag="deepspeed")
            self._take(objective)
            if self._reference is not None:
                self._reference.load(Path(directory) / REFERENCE_FILE)
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{directory}: the learner's state cannot be loaded ({error}); "
                "remove this checkpoint to go on from the one before it"
            ) from error
        if found is None:
            raise CheckpointError(f"{directory}: holds no learner state; remove it to go on from the checkpoint before")
        self._version = int(state["version"])
        torch.set_rng_state(state["torch_rng"])

    def _gather(self, parameters: Sequence[torch.nn.Parameter]) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)

    def _gather_to_write(self, parameters: Sequence[torch.nn.Parameter]) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


def add_parts(parts: Sequence[PartSums], *, seconds: float) -> PartSums:
    """The sums over all parts, which took `seconds` together."""
    kls = [part.kl for part in parts if part.kl is not None]
    return PartSums(
        loss=sum(part.loss for part in parts),
        entropy=sum(part.entropy for part in parts),
        kl=sum(kls) if kls else None,
        tokens=sum(part.tokens for part in parts),
        ratios=add_sums(part.ratios for part in parts),
        seconds=seconds,
    )


def _trainable(module: DnaLlm) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _merge(features: Sequence[Features]) -> Features:
    return {key: value for bundle in features for key, value in bundle.items()}


def _exhaust(tensors: Iterator[tuple[str, Tensor]]) -> Mapping[str, None]:
    """Take part in the gathers without keeping what they give."""
    return {name: None for name, _ in tensors}
