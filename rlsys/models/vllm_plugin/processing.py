"""How a prompt with DNA slots enters vLLM: features and their content keys in, placeholder ranges out.

A prompt arrives as the token ids that the learner will see, slots already S + 2 tokens wide, and leaves unchanged. The
features of each slot are one item of the modality `dna`; items may be None where the engine holds their key already.
Invariant: the k-th item fills the k-th slot, and a prompt whose slots do not match its items is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataItems, MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo, PromptReplacement, PromptUpdate

from rlsys.data.prompts import NUM_MARKERS
from rlsys.models.dna_llm import DnaLlmConfig

MODALITY = "dna"
FEATURES = "dna_features"
"""Name of the keyword under which the model receives the features."""


class DnaItems(ProcessorBatchItems[Tensor | None]):
    """The features [S, E] of each slot of a prompt, in order; None where the engine knows the key."""

    def __init__(self, data: Sequence[Tensor | None]) -> None:
        super().__init__(data, MODALITY)


class DnaDataParser(MultiModalDataParser):
    """Checks what a request brings as `multi_modal_data["dna"]`."""

    def __init__(self, feature_width: int) -> None:
        super().__init__()
        self._feature_width = feature_width

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {MODALITY: self._parse_dna}

    def _parse_dna(self, data: object) -> ModalityDataItems[Any, Any] | None:
        if not isinstance(data, list):
            raise TypeError(f"multi_modal_data['{MODALITY}'] is a list of tensors or None, not {type(data).__name__}")
        items = cast("list[Tensor | None]", data)
        for index, item in enumerate(items):
            if item is not None and (len(item) == 0 or item.shape[1:] != (self._feature_width,)):
                raise ValueError(
                    f"dna item {index} has shape {tuple(item.shape)}; the policy reads [S >= 1, {self._feature_width}]"
                )
        return DnaItems(items)


class DnaProcessingInfo(BaseProcessingInfo):
    """Limits and parsers of the modality."""

    def config(self) -> DnaLlmConfig:
        """The policy's configuration."""
        return self.ctx.get_hf_config(DnaLlmConfig)

    def get_data_parser(self) -> MultiModalDataParser:
        """See `DnaDataParser`."""
        return DnaDataParser(self.config().dna_hidden_size)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of sequences; the engine's `limit_mm_per_prompt` bounds them."""
        return {MODALITY: None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """A single sequence may fill the whole prompt."""
        return {MODALITY: seq_len}


class DnaDummyInputs(BaseDummyInputsBuilder[DnaProcessingInfo]):
    """Inputs for vLLM's memory profiling."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """No text: dummy prompts hold pads only, see `get_dummy_inputs` of the processor."""
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """Features that fill a prompt of `seq_len` tokens together."""
        count = mm_counts.get(MODALITY, 0)
        rows = max(1, seq_len // max(1, count) - NUM_MARKERS)
        width = self.info.config().dna_hidden_size
        return {MODALITY: [torch.zeros(rows, width) for _ in range(count)]}


class DnaProcessor(BaseMultiModalProcessor[DnaProcessingInfo]):
    """Turns items into model keywords and finds their slots."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """The dummy features of `DnaDummyInputs` with a prompt of their slots, already expanded as all prompts are."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        slots = sum(len(item) + NUM_MARKERS for item in inputs.mm_data_items.get(MODALITY, ()))
        inputs.prompt = [self.info.config().dna_pad_token_id] * slots
        return inputs

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        return BatchFeature({FEATURES: hf_data[f"{MODALITY}s"]})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {FEATURES: MultiModalFieldConfig.batched(MODALITY)}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        pad = self.info.config().dna_pad_token_id

        def slot(index: int) -> list[int]:
            features = cast(Tensor, out_mm_kwargs[MODALITY][index][FEATURES].data)
            return [pad] * (len(features) + NUM_MARKERS)

        return [PromptReplacement(modality=MODALITY, target=[pad], replacement=slot)]

    def _apply_prompt_updates(
        self, token_ids: list[int], mm_prompt_updates: Any
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        """Find the slots of a prompt that is already expanded: the k-th run of pads holds the k-th item."""
        pad = self.info.config().dna_pad_token_id
        lengths = [len(updates[0].content.full) for updates in mm_prompt_updates.get(MODALITY, ())]
        placeholders: list[PlaceholderFeaturesInfo] = []
        for index, start in enumerate(find_slots(token_ids, pad, lengths)):
            tokens = token_ids[start : start + lengths[index]]
            placeholders.append(PlaceholderFeaturesInfo(MODALITY, index, start, tokens, is_embed=None))
        return token_ids, {MODALITY: placeholders} if placeholders else {}


def find_slots(token_ids: Sequence[int], pad: int, lengths: Sequence[int]) -> list[int]:
    """Starts of the slots of the given lengths in an expanded prompt; adjacent slots share a run of pads.

    Raises ValueError unless the prompt's pads are exactly these slots.
    """
    starts: list[int] = []
    position = 0
    for index, length in enumerate(lengths):
        while position < len(token_ids) and token_ids[position] != pad:
            position += 1
        if list(token_ids[position : position + length]) != [pad] * length:
            raise ValueError(f"dna item {index} needs a slot of {length} tokens, and the prompt has none at {position}")
        starts.append(position)
        position += length
    if pad in token_ids[position:]:
        raise ValueError(f"the prompt has more DNA pad tokens than its {len(lengths)} dna items fill")
    return starts
