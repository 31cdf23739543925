"""The models that the project makes itself: real classes, the same for the same seed, and fit for the task."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, EsmModel, Qwen3ForCausalLM

from rlsys.config import TinyPolicy
from rlsys.data import dna
from rlsys.models.tiny import make_tiny_encoder, make_tiny_policy, words_tokenizer
from rlsys.tasks.variant_consequence import problems

CODONS = sorted(dna.GENETIC_CODE)


@pytest.fixture(scope="module")
def encoder_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder"), seed=0)


@pytest.fixture(scope="module")
def policy_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"), TinyPolicy(kind="tiny"), seed=0)


def weights_digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def features_BSE(directory: Path, sequences: list[str]) -> torch.Tensor:
    """Features of sequences of one length, without <cls>."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval()
    ids = torch.tensor([tokenizer(sequence).input_ids for sequence in sequences])
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 1:]


def test_the_encoder_is_an_esm_model_of_the_nucleotide_transformer_layout(encoder_directory: Path):
    model = AutoModel.from_pretrained(encoder_directory, add_pooling_layer=False)
    assert isinstance(model, EsmModel)
    assert model.config.position_embedding_type == "absolute"
    vocabulary = (encoder_directory / "vocab.txt").read_text().splitlines()
    assert vocabulary[:5] == ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>"]
    assert vocabulary[5:69] == CODONS  # all 64 3-mers
    assert vocabulary[69:] == ["A", "C", "G", "T", "N"]


def test_the_encoder_reads_3_mers_and_single_letters_where_none_fits(encoder_directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(encoder_directory)
    assert tokenizer.tokenize("ACGTTTNACGAC") == ["ACG", "TTT", "N", "ACG", "A", "C"]
    ids = tokenizer("ACG").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<cls>", "ACG"]  # no <eos>, as in the Nucleotide Transformer


def test_every_codon_is_linearly_readable_from_the_features_at_any_position(encoder_directory: Path):
    # A linear map fitted on windows of random codons names every codon of other windows.
    generator = torch.Generator().manual_seed(0)
    codons_BS = torch.randint(len(CODONS), (400, 5), generator=generator)
    sequences = ["".join(CODONS[codon] for codon in row) for row in codons_BS.tolist()]
    features = features_BSE(encoder_directory, sequences).flatten(0, 1)
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    targets = torch.nn.functional.one_hot(codons_BS.flatten(), len(CODONS)).double()
    seen = len(inputs) // 2
    solution = torch.linalg.lstsq(inputs[:seen], targets[:seen]).solution
    named = (inputs[seen:] @ solution).argmax(dim=1)
    assert (named == codons_BS.flatten()[seen:]).double().mean() > 0.99


def test_the_encoder_holds_a_whole_kegg_window(encoder_directory: Path):
    assert features_BSE(encoder_directory, ["ACG" * 1333 + "AC"]).shape[1] == 1335  # 4,001 letters: 1,333 3-mers and 2


def test_the_same_seed_makes_the_same_weights(tmp_path: Path, encoder_directory: Path, policy_directory: Path):
    torch.rand(3)  # whatever was drawn before
    shape = TinyPolicy(kind="tiny")
    assert weights_digest(make_tiny_encoder(tmp_path / "e0", seed=0)) == weights_digest(encoder_directory)
    assert weights_digest(make_tiny_encoder(tmp_path / "e1", seed=1)) != weights_digest(encoder_directory)
    assert weights_digest(make_tiny_policy(tmp_path / "p0", shape, seed=0)) == weights_digest(policy_directory)
    assert weights_digest(make_tiny_policy(tmp_path / "p1", shape, seed=1)) != weights_digest(policy_directory)


def test_making_models_leaves_the_global_random_state_alone(tmp_path: Path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make_tiny_encoder(tmp_path, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_the_policy_is_a_qwen3_model_of_the_configured_shape(tmp_path: Path):
    shape = TinyPolicy(kind="tiny", hidden_size=64, layers=2, attention_heads=2)
    directory = make_tiny_policy(tmp_path, shape, seed=0)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert isinstance(model, Qwen3ForCausalLM)
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.head_dim) == (64, 2, 32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_policys_special_tokens_are_those_of_its_tokenizer(policy_directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(policy_directory)
    model = AutoModelForCausalLM.from_pretrained(policy_directory)
    assert tokenizer.convert_ids_to_tokens([model.config.eos_token_id, model.config.pad_token_id]) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    assert model.config.vocab_size == len(tokenizer)


def test_every_text_of_the_task_comes_back_from_its_tokens(policy_directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(policy_directory)
    for problem in problems(train=200, validation=1, test=1, seed=0, window_codons=5, misread_rate=0.5).train:
        for text in (problem.question, problem.demonstration, problem.answer):
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["two  spaces , and a comma", "β-catenin → MYC\n\n\ttab", "Argon", "a <think> b", ""])
def test_any_other_text_comes_back_too(text: str):
    tokenizer = words_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_demonstration_takes_one_token_for_each_of_its_words():
    tokenizer = words_tokenizer()
    text = "<think>CGA>TGA C>T Arg>Ter</think>\nAnswer: p.Arg117Ter nonsense"
    assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == [
        "<think>", "C", "G", "A", ">", "T", "G", "A", " ", "C", ">", "T", " ", "Arg", ">", "Ter", "</think>",
        "\nAnswer: ", "p.", "Arg", "1", "1", "7", "Ter", " nonsense",
    ]  # fmt: skip


def test_a_bpe_policy_reads_its_texts_in_fewer_tokens_than_letters(tmp_path: Path):
    text = "Genes in the pathway: KRAS, BRAF and the pathway of the genes."
    shape = TinyPolicy(kind="tiny", tokenizer="bpe", vocabulary=300)
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_policy(tmp_path, shape, seed=0, texts=[text] * 3))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text)
