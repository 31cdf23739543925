"""A policy version as one file: written by the learner, read by every engine on the host.

The file is safetensors (in /dev/shm where there is one) under a temporary name until it is whole, so no reader ever
sees half of it. Invariant: what is loaded is what was written, because the checksum travels beside the path and is
compared before a single tensor is copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlsys.errors import CheckpointError

_BLOCK = 1 << 24


class WeightFile(NamedTuple):
    """Where the weights of a policy version lie, and how to tell that they arrived whole."""

    path: str
    version: int
    checksum: str
    """XXH3 (128 bits, hexadecimal) of the file's bytes."""
    num_bytes: int


def write_weights(path: Path | str, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> WeightFile:
    """Write all tensors to `path` in one rename, and return what a reader needs.

    Raises CheckpointError when the place is full or cannot be written; nothing is left behind then.
    """
    place = Path(path)
    draft = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(named_tensors), draft)
        weight_file = WeightFile(str(place), version, file_checksum(draft), draft.stat().st_size)
        draft.replace(place)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            draft.unlink()
        raise CheckpointError(
            f"{place}: the weights of policy version {version} cannot be written ({error}); is the place full?"
        ) from error
    return weight_file


def read_weights(weight_file: WeightFile) -> dict[str, Tensor]:
    """Return the tensors by name, mapped from the file.

    Raises CheckpointError when the file is missing, differs from what was written, or is no safetensors file.
    """
    where = f"{weight_file.path}: weights of policy version {weight_file.version}"
    try:
        found = file_checksum(weight_file.path)
        if found != weight_file.checksum:
            raise CheckpointError(
                f"{where} are damaged (checksum {found}, written as {weight_file.checksum}); publish the version again"
            )
        return load_file(weight_file.path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{where} cannot be read ({error}); publish the version again") from error


def file_checksum(path: Path | str) -> str:
    """XXH3 of a file's bytes: several GB/s, and made to find damage, not malice."""
    state = xxhash.xxh3_128()
    with Path(path).open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()
