"""A DNA encoder and a language model that the project makes itself: real architectures, tiny, seeded, in seconds.

Stands in for downloaded checkpoints: both functions write a Hugging Face directory that loads like any other of its
family (`EsmModel`, `Qwen3ForCausalLM`), so no later stage knows that a model is tiny. The one invariant: the same
arguments write the same weights and the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import EsmConfig, EsmModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlsys.config import TinyPolicy
from rlsys.data import dna
from rlsys.data.prompts import END_OF_TEXT, END_OF_TURN
from rlsys.models.tiny_bpe import train_bpe_tokenizer, wrap_tokenizer
from rlsys.tasks.variant_consequence import Consequence

KMER = 3
ENCODER_SPECIAL_TOKENS = ("<unk>", "<pad>", "<mask>", "<cls>", "<eos>")


def make_tiny_encoder(
    directory: Path, *, seed: int = 0, width: int = 64, layers: int = 1, max_positions: int = 2048
) -> Path:
    """Write an encoder of the ESM-family Nucleotide Transformer v1 layout with random weights; return its directory.

    It reads non-overlapping 3-mers where the NT reads 6-mers; the letters left over at the end, and those around an N,
    are tokens of their own. Positions are learned and absolute, as in NT v1. A random network is a usable encoder
    because its residual stream keeps each token's embedding: with `width` >= 64 the 3-mer stays linearly readable from
    the last hidden state.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kmers = ["".join(letters) for letters in product(dna.NUCLEOTIDES, repeat=KMER)]
    vocabulary = [*ENCODER_SPECIAL_TOKENS, *kmers, *dna.ALPHABET]
    config = EsmConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=max_positions,
        position_embedding_type="absolute",
        pad_token_id=vocabulary.index("<pad>"),
        mask_token_id=vocabulary.index("<mask>"),
        token_dropout=True,
        emb_layer_norm_before=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-12,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        EsmModel(config, add_pooling_layer=False).save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer_config = {
        "tokenizer_class": "EsmTokenizer",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "cls_token": "<cls>",
        "eos_token": None,
        "model_max_length": max_positions - 2,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    return directory


def make_tiny_policy(directory: Path, shape: TinyPolicy, *, seed: int = 0, texts: Iterable[str] = ()) -> Path:
    """Write a Qwen3-architecture causal language model with its tokenizer, and return the directory.

    `shape.tokenizer` is `words` (one token for each word of the variant-consequence task) or `bpe` (byte-level BPE of
    `shape.vocabulary` tokens, trained on `texts`). Input and output embeddings are tied.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = words_tokenizer() if shape.tokenizer == "words" else train_bpe_tokenizer(texts, shape.vocabulary)
    tokenizer.save_pretrained(directory)
    special_ids: dict[str, int] = tokenizer.get_vocab()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=max(1, shape.attention_heads // 2),
        head_dim=shape.hidden_size // shape.attention_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=special_ids[END_OF_TURN],
        pad_token_id=special_ids[END_OF_TEXT],
        attention_dropout=0.0,
        # Keeps the variance through a layer. Qwen3's own 0.02 suits its widths; at 128 it nearly doubles SFT.
        initializer_range=shape.hidden_size**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer of the variant-consequence task: one token for each of its words, digits and nucleotides.

    It takes the segmentation into the fewest pieces (a unigram model whose words are all equally likely). What is no
    word is spelled in bytes, so every text round-trips.
    """
    amino_acids = sorted(set(dna.GENETIC_CODE.values()))
    words = [
        *dna.ALPHABET, *"0123456789", *" \n>=?", *amino_acids, "<think>", "</think>", "\nAnswer: ", "p.",
        *(f" {consequence}" for consequence in Consequence), "Protein change at codon ", "user\n", "assistant\n",
    ]  # fmt: skip
    spelling = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [("<unk>", 0.0), *((word, -1.0) for word in words), *((byte, -10.0) for byte in spelling)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    decoder: Any = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.decoder = decoder
    return wrap_tokenizer(tokenizer)
