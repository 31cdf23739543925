"""Frozen DNA encoders: sequence -> features [S, E], one row for each position that the encoder reads.

The embedding service runs `encode`; prompt rendering needs `num_positions` and `key` only, which touch neither torch
nor the weights. Invariant: a key names the sequence and everything else that features depend on (weights, layer,
dtype), so equal keys mean equal features, for ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from rlsys.errors import CheckpointError, DataError
from rlsys.models.kmers import KmerTokenizer
from rlsys.models.weight_files import check_weight_files

if TYPE_CHECKING:
    from rlsys.models.esm import EsmRunner

DTYPES = ("float32", "float16", "bfloat16")


class DnaEncoder(Protocol):
    """Asked by the prompt renderer (sizes and keys) and by the embedding service (features)."""

    @property
    def encoder_id(self) -> str:
        """Names the weights, the layer and the dtype: two encoders with one id make the same features."""
        ...

    @property
    def width(self) -> int:
        """E: columns of the features."""
        ...

    def num_positions(self, sequence: str) -> int:
        """S: rows of the features of `sequence`. Cheap. Raises DataError when the encoder cannot read it."""
        ...

    def key(self, sequence: str) -> str:
        """Content key of the features of `sequence`: 32 hexadecimal digits."""
        ...

    def load(self) -> None:
        """Read the weights now, and not within the first `encode`."""
        ...

    def encode(self, sequences: Sequence[str]) -> list[NDArray[Any]]:
        """Features [S, E] of each sequence, in order. Raises DataError as `num_positions`."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a policy's configuration records about the encoder that its features come from."""
        ...


class EsmEncoder:
    """An ESM-family encoder with DNA k-mers: the Nucleotide Transformer v1 and models of its layout.

    The directory holds config.json, vocab.txt and the weights of a transformers `EsmModel` or `EsmForMaskedLM`. The
    weights are loaded by the first `encode`. Rows of special tokens are dropped.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        layer: int = -1,
        dtype: str = "float32",
        device: str = "cpu",
        batch_positions: int = 16_384,
    ) -> None:
        """`layer` counts hidden states as transformers does: 0 is the embedding, -1 the last (after the final norm).

        `dtype` is what the encoder computes in; features come as float16 then, or as float32 for "float32" and
        "bfloat16", which numpy has no type for. `batch_positions` bounds the padded tokens of one pass. Raises
        CheckpointError when the directory is no such encoder.
        """
        assert dtype in DTYPES, f"dtype {dtype!r} is none of {DTYPES}"
        self._directory = Path(path)
        self._config = _read_esm_config(self._directory)
        self._tokenizer = KmerTokenizer.from_file(self._directory / "vocab.txt")
        num_layers = int(self._config["num_hidden_layers"])
        self._layer = layer + num_layers + 1 if layer < 0 else layer
        if not 0 <= self._layer <= num_layers:
            raise CheckpointError(f"{path}: has {num_layers} layers, so no layer {layer}; use -1 for the last")
        self._dtype = dtype
        self._device = device
        self._batch_positions = batch_positions
        self._runner: EsmRunner | None = None
        weights_id = _weights_id(self._directory)
        self._encoder_id = f"esm-{weights_id}-l{self._layer}-{dtype}"
        self._special_tokens = _special_tokens(self._directory, self._tokenizer)
        # Absolute positions start after the padding index (1): the table holds max_position_embeddings - 2 tokens.
        padding_index = self._tokenizer.vocabulary["<pad>"]
        self.max_positions = (
            int(self._config["max_position_embeddings"]) - padding_index - 1 - len(self._special_tokens)
        )

    @property
    def encoder_id(self) -> str:
        """See `DnaEncoder`."""
        return self._encoder_id

    @property
    def width(self) -> int:
        """See `DnaEncoder`."""
        return int(self._config["hidden_size"])

    def num_positions(self, sequence: str) -> int:
        """S, special tokens left out. Raises DataError for an unknown letter and for an over-long sequence."""
        positions = self._tokenizer.num_tokens(sequence)
        if not 1 <= positions <= self.max_positions:
            raise DataError(
                f"a DNA sequence of {len(sequence)} nucleotides is {positions} encoder positions; {self._directory} "
                f"reads 1 to {self.max_positions}. Cut a window of at most "
                f"{self.max_positions * self._tokenizer.k} nucleotides around the variant, or use another encoder."
            )
        return positions

    def key(self, sequence: str) -> str:
        """See `DnaEncoder`."""
        return hashlib.blake2b(f"{self._encoder_id}\n{sequence}".encode(), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """See `DnaEncoder`."""
        return {"kind": "esm", "id": self._encoder_id, "layer": self._layer, "dtype": self._dtype}

    def load(self) -> None:
        """See `DnaEncoder`."""
        self._loaded()

    def _loaded(self) -> EsmRunner:
        if self._runner is None:
            from rlsys.models.esm import EsmRunner  # here, so that counting positions does not cost torch

            self._runner = EsmRunner(self._directory, layer=self._layer, dtype=self._dtype, device=self._device)
        return self._runner

    def encode(self, sequences: Sequence[str]) -> list[NDArray[Any]]:
        """Features [S_i, E] in input order; sequences of similar length share a pass, with true masks."""
        lengths = [self.num_positions(sequence) for sequence in sequences]
        runner = self._loaded()
        order = sorted(range(len(sequences)), key=lambda index: -lengths[index])
        prefix, suffix = self._special_ids()
        features: dict[int, NDArray[Any]] = {}
        for batch in _batches(order, lengths, self._batch_positions):
            ids = [[*prefix, *self._tokenizer.ids(sequences[index]), *suffix] for index in batch]
            hidden = runner.run(ids, padding_id=self._tokenizer.vocabulary["<pad>"])
            for index, rows in zip(batch, hidden, strict=True):
                features[index] = np.ascontiguousarray(rows[len(prefix) : len(prefix) + lengths[index]])
        return [features[index] for index in range(len(sequences))]

    def _special_ids(self) -> tuple[list[int], list[int]]:
        ids = [self._tokenizer.vocabulary[token] for token in self._special_tokens]
        return ids[:1], ids[1:]


def _batches(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split indices, longest first, so that (size x longest) stays within `budget`; at least one in each."""
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _read_esm_config(directory: Path) -> dict[str, Any]:
    """Read config.json. Raises CheckpointError when this is no ESM-family model that transformers runs natively."""
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such directory; the encoder's weights must be on disk, so download them first and name "
            "their directory"
        )
    try:
        parsed: object = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}/config.json: cannot be read ({error}); is this an encoder?") from error
    config = cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {}
    if config.get("model_type") != "esm":
        raise CheckpointError(
            f"{directory}: holds a {config.get('model_type')!r} model; the encoder kind 'esm' reads Nucleotide "
            "Transformer v1 checkpoints and others of model_type 'esm'"
        )
    if "auto_map" in config or config.get("add_bias_fnn") is False:
        raise CheckpointError(
            f"{directory}: is a Nucleotide Transformer v2 (gated feed-forward, remote code), whose code does not run "
            "on transformers 5. Use a v1 checkpoint, such as nucleotide-transformer-500m-human-ref."
        )
    sizes = ("hidden_size", "num_hidden_layers", "max_position_embeddings")
    if missing := [name for name in sizes if not isinstance(config.get(name), int)]:
        raise CheckpointError(
            f"{directory}/config.json: has no {missing[0]}, or no whole number there; restore the file"
        )
    return config


def _special_tokens(directory: Path, tokenizer: KmerTokenizer) -> list[str]:
    """The tokens around a sequence: <cls>, then <eos> unless the tokenizer's configuration turns it off (NT does)."""
    settings: dict[str, Any] = {}
    path = directory / "tokenizer_config.json"
    if path.is_file():
        try:
            settings = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); restore the file") from error
    tokens = ["<cls>"] + (["<eos>"] if settings.get("eos_token", "<eos>") is not None else [])
    missing = [token for token in (*tokens, "<pad>") if token not in tokenizer.vocabulary]
    if missing:
        raise CheckpointError(f"{directory}/vocab.txt: has no {missing[0]!r}; is this an ESM-family encoder?")
    return tokens


def _weights_id(directory: Path) -> str:
    """12 hexadecimal digits that name the weights: SHA-256 over configuration, vocabulary and weights files."""
    weights = sorted([*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")])
    if not weights:
        raise CheckpointError(f"{directory}: holds no weights (*.safetensors or pytorch_model*.bin)")
    check_weight_files(directory)
    digest = hashlib.sha256()
    for path in (directory / "config.json", directory / "vocab.txt", *weights):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
