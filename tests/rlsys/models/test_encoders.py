from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EsmConfig, EsmForMaskedLM, EsmModel, EsmTokenizer

from rlsys.errors import CheckpointError, DataError
from rlsys.models.encoders import EsmEncoder
from rlsys.models.kmers import KmerTokenizer

SPECIAL = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>"]
SEQUENCES = ["ACGTACGTACGTN", "AC", "GATTACA" * 9, "ACGNNACGT", "TTTTTT"]


def vocabulary(k: int) -> list[str]:
    """The order of the Nucleotide Transformer: special tokens, all k-mers, letters."""
    return [*SPECIAL, *("".join(kmer) for kmer in product("ATCG", repeat=k)), *"ATCGN"]


def make_encoder(directory: Path, *, k: int = 3, seed: int = 0, eos: bool = False, masked_lm: bool = False) -> Path:
    tokens = vocabulary(k)
    torch.manual_seed(seed)
    config = EsmConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=50, position_embedding_type="absolute", token_dropout=True, pad_token_id=1,
        mask_token_id=2, emb_layer_norm_before=False,
    )  # fmt: skip
    model = EsmForMaskedLM(config) if masked_lm else EsmModel(config, add_pooling_layer=False)
    model.save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(tokens))
    settings = {"tokenizer_class": "EsmTokenizer", "eos_token": "<eos>" if eos else None}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("k", [2, 3, 6])
def test_tokens_equal_those_of_the_real_tokenizer(tmp_path: Path, k: int) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary(k)))
    theirs = EsmTokenizer(str(tmp_path / "vocab.txt"), eos_token=None)
    mine = KmerTokenizer.from_file(tmp_path / "vocab.txt")
    assert mine.k == k
    draw = random.Random(k)
    for length in [*range(1, 30), 100, 301]:
        for share_of_n in (0, 1, 6):
            sequence = "".join(draw.choices("ACGTN", weights=[6, 6, 6, 6, share_of_n], k=length))
            assert [theirs.cls_token_id, *mine.ids(sequence)] == theirs(sequence)["input_ids"]
            assert mine.num_tokens(sequence) == len(mine.ids(sequence))


def test_a_kmer_vocabulary_by_hand(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary(3)))
    tokens = KmerTokenizer.from_file(tmp_path / "vocab.txt").tokens
    assert list(tokens("ACGTTTAC")) == ["ACG", "TTT", "A", "C"]
    assert list(tokens("ACNGTACC")) == ["A", "C", "N", "GTA", "C", "C"]


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("batch_positions", [1, 30, 10_000])
def test_features_are_the_hidden_states_of_each_sequence_alone(
    tmp_path: Path, layer: int, eos: bool, batch_positions: int
) -> None:
    make_encoder(tmp_path, eos=eos)
    model, tokenizer = (
        EsmModel.from_pretrained(tmp_path, add_pooling_layer=False),
        EsmTokenizer.from_pretrained(tmp_path),
    )
    encoder = EsmEncoder(tmp_path, layer=layer, batch_positions=batch_positions)
    found = encoder.encode(SEQUENCES)
    for sequence, features in zip(SEQUENCES, found, strict=True):
        ids = torch.tensor([tokenizer(sequence)["input_ids"]])
        with torch.no_grad():
            hidden = model.eval()(ids, output_hidden_states=True).hidden_states[layer][0].numpy()
        expected = hidden[1:-1] if eos else hidden[1:]
        assert features.dtype == np.float32
        assert features.shape == (encoder.num_positions(sequence), encoder.width) == expected.shape
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_a_masked_language_model_directory_works_as_an_encoder(tmp_path: Path) -> None:
    make_encoder(tmp_path, masked_lm=True)
    assert EsmEncoder(tmp_path).encode(["ACGTAC"])[0].shape == (2, 16)


@pytest.mark.parametrize(("dtype", "expected"), [("float16", np.float16), ("bfloat16", np.float32)])
def test_the_dtype_is_that_of_the_computation(directory: Path, dtype: str, expected: type) -> None:
    exact = EsmEncoder(directory).encode(SEQUENCES)[2]
    rounded = EsmEncoder(directory, dtype=dtype).encode(SEQUENCES)[2]
    assert rounded.dtype == expected
    np.testing.assert_allclose(rounded, exact, atol=0.1)  # 8 bits of mantissa, hidden states of a few units


def test_the_key_names_all_that_features_depend_on(directory: Path, tmp_path: Path) -> None:
    other = make_encoder(tmp_path, seed=1)
    encoders = [
        EsmEncoder(directory), EsmEncoder(directory, layer=1), EsmEncoder(directory, dtype="bfloat16"),
        EsmEncoder(other),
    ]  # fmt: skip
    keys = {encoder.key(sequence) for encoder in encoders for sequence in ("ACGT", "ACGA")}
    assert len(keys) == 8
    assert len({encoder.encoder_id for encoder in encoders}) == 4
    same = EsmEncoder(directory, layer=2, batch_positions=1)
    assert (same.key("ACGT"), same.describe()) == (encoders[0].key("ACGT"), encoders[0].describe())


def test_sizes_and_keys_need_no_torch(directory: Path) -> None:
    code = (
        "import sys; from rlsys.models.encoders import EsmEncoder; encoder = EsmEncoder(sys.argv[1]); "
        "print(encoder.num_positions('ACGTACGA'), len(encoder.key('A')), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["4", "32", "False"]


def test_the_longest_sequence_fits_and_one_more_position_is_an_error(directory: Path) -> None:
    encoder = EsmEncoder(directory)
    # 50 positions: 2 up to the padding index, 1 for <cls>, 47 for 3-mers.
    assert encoder.max_positions == 47
    assert encoder.encode(["ACG" * 47])[0].shape == (47, 16)
    with pytest.raises(DataError, match=r"142 nucleotides is 48 encoder positions.*1 to 47"):
        encoder.num_positions("ACG" * 47 + "A")
    with pytest.raises(DataError, match="1 to 47"):
        encoder.encode(["ACG", ""])


@pytest.mark.parametrize(("sequence", "letter"), [("ACGU", "'U' at position 3"), ("acg", "'a' at position 0")])
def test_a_letter_that_is_no_dna_is_named(directory: Path, sequence: str, letter: str) -> None:
    with pytest.raises(DataError, match=letter):
        EsmEncoder(directory).num_positions(sequence)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def protein_vocabulary(directory: Path) -> None:
    (directory / "vocab.txt").write_text("\n".join([*SPECIAL, *"LAGVSERTIDPKQNFYMHWCX"]))


def cut_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (edit_config(model_type="bert"), "'bert' model.*Nucleotide Transformer v1"),
        (edit_config(auto_map={"AutoModel": "x--y.Z"}), "Nucleotide Transformer v2"),
        (edit_config(add_bias_fnn=False), "Nucleotide Transformer v2"),
        (edit_config(num_hidden_layers=3), "weights are missing"),
        (lambda path: (path / "config.json").unlink(), r"config\.json: cannot be read"),
        (lambda path: (path / "vocab.txt").unlink(), "vocabulary cannot be read"),
        (lambda path: (path / "model.safetensors").unlink(), "holds no weights"),
        (protein_vocabulary, "protein"),
        (cut_weights, "damaged"),
    ],
)  # fmt: skip
def test_a_directory_that_is_no_encoder_is_explained(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(make_encoder(tmp_path))
    with pytest.raises(CheckpointError, match=reason):
        EsmEncoder(tmp_path).encode(["ACGT"])


def test_a_layer_that_the_encoder_lacks_is_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="has 2 layers, so no layer 3"):
        EsmEncoder(directory, layer=3)
