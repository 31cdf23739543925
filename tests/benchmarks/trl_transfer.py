"""A weight transfer that works on a CPU, for the vLLM server of TRL's AsyncGRPO: weights come in a file.

Linear layers keep vLLM's own packed products, so each update goes through vLLM's layer-wise reload, which packs again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Where the weights are."""

    path: str


class FileTransfer(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Reads all weights from a safetensors file."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to prepare."""

    def start_weight_update(self) -> None:
        """Make room for weights as they come from a file."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Load the file."""
        from safetensors.torch import load_file

        cast(Any, self.model).load_weights(load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        """Pack the weights again; a tied head, which the reload leaves out, too."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        for module in cast(Any, self.model).modules():
            if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing is held."""
