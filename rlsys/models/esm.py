"""The torch side of `EsmEncoder`: token ids in, hidden states of one layer out. Loads weights when made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import EsmModel

from rlsys.errors import CheckpointError


class EsmRunner:
    """A frozen `EsmModel` on one device."""

    def __init__(self, directory: Path, *, layer: int, dtype: str, device: str) -> None:
        """Raises CheckpointError when the weights cannot be loaded, or are not all there."""
        try:
            loaded: Any = EsmModel.from_pretrained(
                directory,
                add_pooling_layer=False,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{directory}: the encoder's weights cannot be loaded ({reason})") from error
        model, info = loaded
        # A mismatch is reported as (name, shape found, shape expected).
        absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        # The contact head is not asked for features.
        if names := sorted(name for name in absent if not name.startswith("contact_head")):
            raise CheckpointError(f"{directory}: {len(names)} weights are missing or of another shape ({names[0]})")
        self._is_last = layer == model.config.num_hidden_layers
        self._layer = layer
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device

    @torch.inference_mode()
    def run(self, ids: Sequence[Sequence[int]], *, padding_id: int) -> list[NDArray[Any]]:
        """Hidden states [tokens, E] of each sequence of token ids, special tokens included, padding cut off."""
        longest = max(len(one) for one in ids)
        ids_BT = torch.full((len(ids), longest), padding_id, dtype=torch.long)
        mask_BT = torch.zeros((len(ids), longest), dtype=torch.long)
        for row, one in enumerate(ids):
            ids_BT[row, : len(one)] = torch.tensor(one)
            mask_BT[row, : len(one)] = 1
        output = self._model(
            input_ids=ids_BT.to(self._device),
            attention_mask=mask_BT.to(self._device),
            output_hidden_states=not self._is_last,
        )
        hidden_BTE = output.last_hidden_state if self._is_last else output.hidden_states[self._layer]
        if hidden_BTE.dtype == torch.bfloat16:
            hidden_BTE = hidden_BTE.float()
        return [hidden_BTE[row, : len(one)].cpu().numpy() for row, one in enumerate(ids)]
