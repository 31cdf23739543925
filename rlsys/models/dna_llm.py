"""The policy: a Hugging Face causal LM that reads DNA through projected encoder features.

The learner runs it (forward with targets), evaluation and tests run it as an ordinary causal LM (forward without), and
the vLLM plug-in holds the same parameters under the same names (`language_model.*`, `projector.*`).

Invariant: features enter **by position**. A slot is named by (row, start, length) and holds S + 2 tokens: a learned
start marker, S projected feature rows, a learned end marker. The ids that stand there are never read, and a
`dna_pad` id anywhere else is an ordinary token: the policy may sample it.

Packing: several sequences share a row when `position_ids` restart at 0 in each; the attention mask is derived from
that, never passed. Transformers drops that rule silently when a mask or a cache is in play, so neither can be passed
here, and `packing_check.check_packing` proves the rule for the attention implementation in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.generic import ModelOutput

from rlsys.data.prompts import NUM_MARKERS
from rlsys.errors import ConfigError
from rlsys.models.logprobs import token_logprobs
from rlsys.models.projector import DnaProjector
from rlsys.types import DnaSlot

MODEL_TYPE = "rlsys_dna_llm"
PROJECTOR_KINDS = ("mlp", "linear")
# Heads that transform logits after the matrix product, which `token_logprobs` does not do.
_UNSUPPORTED_HEAD_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class DnaLlmConfig(PreTrainedConfig):
    """What the policy is made of: a text model's configuration, the projector, and where its features come from."""

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    projector_kind: str = "mlp"
    dna_hidden_size: int = 1
    """E: width of the encoder's features."""
    dna_pad_token_id: int = 0
    """The id that fills DNA slots in a prompt."""
    encoder: dict[str, Any] | None = None
    """Which frozen encoder the features come from (kind, id, layer, ...): free-form JSON, not read by the model."""
    tie_word_embeddings: bool = False
    """Always the text model's setting."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = CONFIG_MAPPING["qwen3"]()
        elif isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type", "qwen3")
            self.text_config = CONFIG_MAPPING[model_type](**self.text_config)
        if self.projector_kind not in PROJECTOR_KINDS:
            raise ConfigError(f"projector_kind {self.projector_kind!r} is unknown; use one of {PROJECTOR_KINDS}")
        self.encoder = dict(self.encoder or {})
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)


@dataclass
class DnaLlmOutput(ModelOutput):
    """Either `logits`, or `logprobs` and `entropies` of the N targets that were asked for."""

    logits: Tensor | None = None
    """[B, T, V], in the model's dtype."""
    logprobs: Tensor | None = None
    """[N] float32, natural log, at the temperature given."""
    entropies: Tensor | None = None
    """[N] float32, nats, without gradient."""


class DnaLlm(PreTrainedModel):
    """A causal LM with a DNA projector; see the module docstring for slots and packing."""

    config_class = DnaLlmConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DnaLlmConfig) -> None:
        super().__init__(config)
        text_config = cast(PreTrainedConfig, config.text_config)
        for setting in _UNSUPPORTED_HEAD_SETTINGS:
            if getattr(text_config, setting, None) not in (None, 1.0):
                raise ConfigError(
                    f"text model {text_config.model_type!r} sets {setting}={getattr(text_config, setting)}: its head "
                    "transforms the logits, which rlsys does not do. Use a model without it (Qwen3, Llama, ...)."
                )
        self.language_model: PreTrainedModel = AutoModelForCausalLM.from_config(text_config)
        self.projector = DnaProjector(config.projector_kind, config.dna_hidden_size, text_config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DnaProjector):
            init.normal_(module.start_marker, mean=0.0, std=0.02)
            init.normal_(module.end_marker, mean=0.0, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding of the language model."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The head of the language model."""
        return cast(nn.Module, self.language_model.get_output_embeddings())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        features: Sequence[Tensor] = (),
        slots: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        visible_segment_ids: Tensor | None = None,
        predictor_positions: Tensor | None = None,
        target_ids: Tensor | None = None,
        temperature: float = 1.0,
        logprob_chunk: int = 512,
    ) -> DnaLlmOutput:
        """Run packed sequences; return logits, or log-probabilities and entropies of `target_ids` alone.

        `input_ids` and `position_ids` are [B, T]; positions restart at 0 in each packed segment (without
        `position_ids` each row is one segment; padding is a segment of its own). `features` holds n tensors [S_i, E]
        and `slots` is [n, 3] with rows (row, start, S_i + 2).

        Shared prompts: with `segment_ids` and `visible_segment_ids` (both [B, T]) a token sees the earlier tokens of
        its own segment and of its visible segment. A row [prompt, completion 1, completion 2, ...] whose completions
        make the prompt visible, and continue its positions, gives what separate sequences would give.

        `target_ids` [N] are scored at `predictor_positions` [N]: flat positions (row * T + t) of the hidden states
        that predict them. The head runs for those positions only.
        """
        embeds_BTH = self._embed(input_ids, features, slots)
        mask = self._shared_prompt_mask(segment_ids, visible_segment_ids, embeds_BTH)
        hidden_BTH = self.language_model.base_model(
            inputs_embeds=embeds_BTH, position_ids=position_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        head = self.get_output_embeddings()
        if target_ids is None:
            return DnaLlmOutput(logits=head(hidden_BTH))
        assert predictor_positions is not None, "targets need the positions that predict them"
        logprobs, entropies = token_logprobs(
            hidden_BTH.flatten(0, 1)[predictor_positions],
            # Read here and not in a chunk: ZeRO-3 then gathers the weight for the whole of this forward.
            cast(Tensor, head.weight),
            cast("Tensor | None", head.bias),
            target_ids,
            temperature=temperature,
            chunk=logprob_chunk,
        )
        return DnaLlmOutput(logprobs=logprobs, entropies=entropies)

    def _embed(self, input_ids: Tensor, features: Sequence[Tensor], slots: Tensor | None) -> Tensor:
        embeds_BTH = self.get_input_embeddings()(input_ids)
        rows_RH = self.projector(features).to(embeds_BTH.dtype)
        positions_R = slot_positions(slots, features, input_ids.shape).to(embeds_BTH.device)
        embeds_NH = embeds_BTH.flatten(0, 1).index_copy(0, positions_R, rows_RH)
        return embeds_NH.view_as(embeds_BTH)

    def _shared_prompt_mask(
        self, segment_ids: Tensor | None, visible_segment_ids: Tensor | None, embeds_BTH: Tensor
    ) -> Tensor | None:
        assert (segment_ids is None) == (visible_segment_ids is None), "shared prompts need both segment tensors"
        if segment_ids is None or visible_segment_ids is None:
            return None
        implementation = attention_implementation(self)
        if implementation not in ("sdpa", "eager"):
            raise ConfigError(
                f"attention implementation {implementation!r} cannot run shared prompts, which need a mask of their "
                "own. Use sdpa, or turn shared prompts off."
            )
        allowed_B1TT = shared_prompt_mask(segment_ids, visible_segment_ids)
        if implementation == "sdpa":
            return allowed_B1TT
        # Eager attention adds its mask to the scores; a boolean one would be added as 0 and 1.
        blocked = torch.finfo(embeds_BTH.dtype).min
        return torch.zeros_like(allowed_B1TT, dtype=embeds_BTH.dtype).masked_fill(~allowed_B1TT, blocked)


def attention_implementation(model: DnaLlm) -> str:
    """What transformers calls the attention that the language model runs (sdpa, eager, flash_attention_2, ...)."""
    return str(model.language_model.config._attn_implementation)  # pyright: ignore[reportPrivateUsage]


def slot_positions(slots: Tensor | None, features: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Flat positions (row * T + t) of all slot rows, slot after slot, for a batch of `shape` (B, T)."""
    num_rows, num_tokens = shape
    slot_rows = cast("list[list[int]]", [] if slots is None else slots.tolist())
    assert len(slot_rows) == len(features), f"{len(features)} features for {len(slot_rows)} slots"
    pieces: list[Tensor] = [torch.zeros(0, dtype=torch.long)]
    for (row, start, length), feature in zip(slot_rows, features, strict=True):
        assert length == len(feature) + NUM_MARKERS, f"slot of {length} tokens for {len(feature)} feature rows"
        assert 0 <= row < num_rows, f"slot in row {row} of {num_rows}"
        assert 0 <= start <= num_tokens - length, f"slot at {start}, of {length} tokens, in a row of {num_tokens}"
        pieces.append(torch.arange(row * num_tokens + start, row * num_tokens + start + length))
    return torch.cat(pieces)


def shared_prompt_mask(segment_ids_BT: Tensor, visible_segment_ids_BT: Tensor) -> Tensor:
    """[B, 1, T, T], True where token q (third axis) sees token k (last axis): k <= q, in q's own or visible segment."""
    key_segment = segment_ids_BT[:, None, :]
    reachable = (segment_ids_BT[:, :, None] == key_segment) | (visible_segment_ids_BT[:, :, None] == key_segment)
    return torch.tril(reachable)[:, None]


def sequence_inputs(
    prompt_ids: Sequence[int],
    slots: Sequence[DnaSlot],
    features: Sequence[Tensor],
    continuation_ids: Sequence[int] = (),
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Forward arguments of one prompt with one continuation; the continuation's tokens are the targets, if any."""
    token_ids = torch.tensor([[*prompt_ids, *continuation_ids]], device=device)
    arguments: dict[str, Any] = {
        "input_ids": token_ids,
        "position_ids": torch.arange(token_ids.shape[1], device=device)[None],
        "features": tuple(feature.to(device) for feature in features),
        "slots": torch.tensor([[0, slot.start, slot.length] for slot in slots], dtype=torch.long).reshape(-1, 3),
    }
    if len(continuation_ids):
        arguments["target_ids"] = token_ids[0, len(prompt_ids) :]
        arguments["predictor_positions"] = torch.arange(len(prompt_ids) - 1, token_ids.shape[1] - 1, device=device)
    return arguments


def register_auto_classes() -> None:
    """Teach transformers' Auto classes this model; may be called any number of times."""
    AutoConfig.register(MODEL_TYPE, DnaLlmConfig, exist_ok=True)
    AutoModel.register(DnaLlmConfig, DnaLlm, exist_ok=True)
    AutoModelForCausalLM.register(DnaLlmConfig, DnaLlm, exist_ok=True)


register_auto_classes()
