"""How a policy version enters an engine: every worker process reads the file that the learner wrote on this host.

Runs inside vLLM's worker, between `start_weight_update` and `finish_weight_update`, while the engine is paused.
Invariant: a worker holds one policy version whole. The file's checksum, names and shapes are checked before the first
tensor is copied; a refused file leaves the old weights in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rlsys.errors import CheckpointError
from rlsys.models.dna_llm import DnaLlm, DnaLlmConfig
from rlsys.models.weights import WeightFile, read_weights


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """The fields of a `WeightFile`."""

    path: str
    version: int
    checksum: str
    num_bytes: int


class FileWeightTransfer(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """The weight-transfer backend "rlsys_file"."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Work out which weights a version must have."""
        self._expected = expected_shapes(cast(DnaLlmConfig, self.model_config.hf_config))

    def start_weight_update(self) -> None:
        """Nothing to prepare: weights are copied in place."""

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Verify the file and copy it in. Raises CheckpointError, before any copy, when it is not whole or foreign."""
        weight_file = WeightFile(update_info.path, update_info.version, update_info.checksum, update_info.num_bytes)
        tensors = read_weights(weight_file)
        check_shapes(tensors, self._expected, weight_file)
        self.model.load_weights(tensors.items())  # pyright: ignore[reportCallIssue] (every vLLM model has it)

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Nothing is held."""


def expected_shapes(config: DnaLlmConfig) -> dict[str, torch.Size]:
    """Name and shape of every weight of a policy, from its configuration alone; of tied weights, the first name."""
    with torch.device("meta"):
        model: nn.Module = DnaLlm(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], weight_file: WeightFile) -> None:
    """Raise CheckpointError unless `tensors` are exactly the expected names in the expected shapes."""
    where = f"{weight_file.path}: weights of policy version {weight_file.version}"
    for verb, names in (("lack", expected.keys() - tensors.keys()), ("hold unknown", tensors.keys() - expected.keys())):
        if names:
            raise CheckpointError(
                f"{where} {verb} {sorted(names)[0]} ({len(names)} such); the learner's policy is another one"
            )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, the engine's has {tuple(shape)}; "
                "the learner's policy is another one"
            )
