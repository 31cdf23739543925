"""What vLLM needs to run a `DnaLlm`: the model, the way its weights arrive, and the client that rollout workers use.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its processes, possibly
more than once. Importing this package costs neither torch nor vLLM.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

MODEL_ARCHITECTURE = "DnaLlm"
"""The name in a policy's config.json, and in vLLM's model registry."""
WEIGHT_TRANSFER_BACKEND = "rlsys_file"

_watchers: list[threading.Thread] = []


def register() -> None:
    """Teach this process the model and the weight transfer; in vLLM's child processes, also to end with the parent.

    vLLM logs what a plug-in raises and goes on without it, so the client checks the registries itself.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.model_executor.models.registry import ModelRegistry

    from rlsys.models.dna_llm import register_auto_classes

    register_auto_classes()
    if MODEL_ARCHITECTURE not in ModelRegistry.models:
        ModelRegistry.register_model(MODEL_ARCHITECTURE, f"{__name__}.model:DnaLlmForVllm")
    if WEIGHT_TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:  # pyright: ignore[reportPrivateUsage]
        WeightTransferEngineFactory.register_engine(
            WEIGHT_TRANSFER_BACKEND, f"{__name__}.weight_transfer", "FileWeightTransfer"
        )
    _keep_cpu_weights_in_place()
    _end_with_parent()


def _keep_cpu_weights_in_place() -> None:
    """Make vLLM's CPU linear layers multiply by their weights as they are.

    It otherwise packs them when they are loaded and empties the originals, so that no new weights can be copied in
    (and a tied head keeps the old ones). The plain product is as fast to within the noise of measurement.
    """
    from torch import nn
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    def keep(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear

    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = keep


def _end_with_parent() -> None:
    """Kill this process when the one that started it is gone, if that was done with multiprocessing (as vLLM does).

    vLLM's engine processes otherwise outlive a front end that was killed, and keep its memory. Python's multiprocessing
    gives every child a pipe that closes when the parent dies, which holds for each step of a chain of processes;
    Linux's parent-death signal would come when the *thread* that forked ends.
    """
    parent = multiprocessing.parent_process()
    if parent is None or _watchers:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    _watchers.append(threading.Thread(target=watch, name="rlsys-end-with-parent", daemon=True))
    _watchers[0].start()
