from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlsys.errors import CheckpointError
from rlsys.models.weights import file_checksum, read_weights, write_weights

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.bfloat16)}


def test_weights_come_back_bit_for_bit_with_their_version(tmp_path: Path) -> None:
    weight_file = write_weights(tmp_path / "new" / "v3.safetensors", iter(TENSORS.items()), version=3)
    assert weight_file.version == 3
    assert weight_file.num_bytes == Path(weight_file.path).stat().st_size
    assert weight_file.checksum == file_checksum(weight_file.path)
    again = read_weights(weight_file)
    assert again.keys() == TENSORS.keys()
    assert all(torch.equal(again[name], TENSORS[name]) for name in TENSORS)
    assert again["b"].dtype == torch.bfloat16


def test_nothing_but_the_whole_file_is_left_behind(tmp_path: Path) -> None:
    write_weights(tmp_path / "v1.safetensors", TENSORS.items(), version=1)
    assert [path.name for path in tmp_path.iterdir()] == ["v1.safetensors"]


def test_a_single_flipped_bit_is_noticed(tmp_path: Path) -> None:
    weight_file = write_weights(tmp_path / "v1.safetensors", TENSORS.items(), version=1)
    content = bytearray(Path(weight_file.path).read_bytes())
    content[-3] ^= 8
    Path(weight_file.path).write_bytes(content)
    with pytest.raises(CheckpointError, match="version 1 are damaged"):
        read_weights(weight_file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    weight_file = write_weights(tmp_path / "v1.safetensors", TENSORS.items(), version=1)
    Path(weight_file.path).unlink()
    with pytest.raises(CheckpointError, match=r"v1\.safetensors.*cannot be read"):
        read_weights(weight_file)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="version 5 cannot be written"):
        write_weights(tmp_path / "file" / "v5.safetensors", TENSORS.items(), version=5)
