"""The policy inside vLLM: vLLM's own language model, and the projector that the learner trains.

Parameters have the learner's names (`language_model.*`, `projector.*`), so weights load without a map. The encoder
cache of vLLM holds the *output* of `embed_multimodal`: after new weights it must be reset (`client.DnaEngine.load`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from rlsys.data.prompts import NUM_MARKERS
from rlsys.models.dna_llm import DnaLlmConfig
from rlsys.models.projector import DnaProjector
from rlsys.models.vllm_plugin.processing import FEATURES, MODALITY, DnaDummyInputs, DnaProcessingInfo, DnaProcessor


@MULTIMODAL_REGISTRY.register_processor(DnaProcessor, info=DnaProcessingInfo, dummy_inputs=DnaDummyInputs)
class DnaLlmForVllm(nn.Module, SupportsMultiModal):
    """A `DnaLlm` as vLLM runs it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = cast(DnaLlmConfig, vllm_config.model_config.hf_config)
        text_config = cast(Any, config.text_config)
        self.config = config
        with self._mark_tower_model(vllm_config, MODALITY):
            self.projector = DnaProjector(config.projector_kind, config.dna_hidden_size, text_config.hidden_size)
        with self._mark_language_model(vllm_config):
            self.language_model: Any = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]],
            )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """None: prompts come as token ids, never as chat messages."""
        return None

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Slot rows [S_i + 2, H] of the features [S_i, E] of each item, in order."""
        # Items of equal length come stacked, [n, S, E].
        features = list(cast("list[Tensor] | Tensor", kwargs.get(FEATURES, [])))
        return list(torch.split(self.projector(features), [len(one) + NUM_MARKERS for one in features]))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """Hidden states; DNA rows are already in `inputs_embeds`."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of the language model's head."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy weights of the learner's names in place; a tied head may be left out."""
        with torch.no_grad():
            return AutoWeightsLoader(self).load_weights(weights)
