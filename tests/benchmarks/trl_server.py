"""vLLM's server, with the weight transfer of `tests.benchmarks.trl_transfer` under the name `trl_file`.

vLLM starts its engine in a process of its own, which imports this file again (multiprocessing's `spawn` does so with
the main module): the engine knows the transfer because it is registered on import.
"""

from __future__ import annotations

from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.entrypoints.launchers.api_server.entry import main

WeightTransferEngineFactory.register_engine("trl_file", "tests.benchmarks.trl_transfer", "FileTransfer")

if __name__ == "__main__":
    main()
