"""The policy: a Hugging Face causal LM that reads DNA through projected encoder features.

The learner runs it (forward with targets), evaluation and tests run it as an ordinary causal LM (forward without), and
the vLLM plug-in holds the same parameters under the same names (`language_model.*`, `projector.*`).

Invariant: features enter **by position**. A slot is named by (row, start, length) and holds S + 2 tokens: a learned
start marker, S projected feature rows, a learned end marker. The ids that stand there are never read, and a
`dna_pad` id anywhere else is an ordinary token: the policy may sample it.

Packing: a micro-batch is one line of tokens, and `samples` says which of them make up each sequence, so that a group's
prompt is run once. It needs the attention of `rlsys.models.packed_attention`; `packing_check.check_packing` proves
before training that packed sequences give what separate ones give.
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
from rlsys.models.logprobs import MAX_LOGITS, token_logprobs
from rlsys.models.packed_attention import PACKED
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
    """[N] float32, nats; without gradient unless it was asked for."""


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
        samples: Tensor | None = None,
        places: Tensor | None = None,
        predictor_positions: Tensor | None = None,
        target_ids: Tensor | None = None,
        temperature: float = 1.0,
        max_logits: int = MAX_LOGITS,
        entropy_gradient: bool = False,
    ) -> DnaLlmOutput:
        """Run sequences; return logits, or log-probabilities and entropies of `target_ids` alone.

        `input_ids` and `position_ids` are [B, T], a row for each sequence, padded at the end. `features` holds n
        tensors [S_i, E] and `slots` is [n, 3] with rows (row, start, S_i + 2).

        Packed: one row [1, T] holds all tokens, `samples` [n, L] the places of each sequence's tokens and `places` [T]
        those of the tokens in `samples` (see `rlsys.data.packing.MicroBatch`). Positions go on from the shared prompt.

        `target_ids` [N] are scored at `predictor_positions` [N]: flat positions (row * T + t) of the hidden states
        that predict them. The head runs for those positions only. With `entropy_gradient` the entropies carry one.
        """
        embeds_BTH = self._embed(input_ids, features, slots)
        hidden_BTH = self.language_model.base_model(
            inputs_embeds=embeds_BTH,
            position_ids=position_ids,
            attention_mask=None,
            use_cache=False,
            **self._packed(samples, places),
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
            max_logits=max_logits,
            entropy_gradient=entropy_gradient,
        )
        return DnaLlmOutput(logprobs=logprobs, entropies=entropies)

    def _embed(self, input_ids: Tensor, features: Sequence[Tensor], slots: Tensor | None) -> Tensor:
        embeds_BTH = self.get_input_embeddings()(input_ids)
        rows_RH = self.projector(features).to(embeds_BTH.dtype)
        positions_R = slot_positions(slots, features, input_ids.shape).to(embeds_BTH.device)
        embeds_NH = embeds_BTH.flatten(0, 1).index_copy(0, positions_R, rows_RH)
        return embeds_NH.view_as(embeds_BTH)

    def _packed(self, samples: Tensor | None, places: Tensor | None) -> dict[str, Tensor]:
        assert (samples is None) == (places is None), "a packed line needs samples and places"
        if samples is None or places is None:
            return {}
        implementation = attention_implementation(self)
        if implementation != PACKED:
            raise ConfigError(
                f"attention implementation {implementation!r} does not know packed sequences: they would see each "
                f"other. Load the policy with attn_implementation={PACKED!r}."
            )
        return {"samples_BL": samples, "places_T": places}


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
