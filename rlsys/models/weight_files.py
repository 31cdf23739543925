"""Weight files of a model directory, checked without loading them: what is cut off or overwritten is found in the
driver, before a process is started that needs the weights.

Invariant: only headers and sizes are read, so that the check of a large model takes no time.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from rlsys.errors import CheckpointError


def check_weight_files(directory: Path) -> None:
    """Raise CheckpointError where a safetensors file of the directory is damaged or incomplete."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy"):
                pass  # opening compares the header with the file's size
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: the weights are damaged ({error}); was the download or the copy interrupted? Get it again"
            ) from error
