"""A DNA-LLM of a few thousand weights, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from rlsys.data.prompts import add_dna_support
from rlsys.models.dna_llm import DnaLlm, DnaLlmConfig, sequence_inputs
from rlsys.types import DnaSlot, FloatArray, Prompt

VOCABULARY, WIDTH, PAD = 80, 12, 3
"""Token ids, E, and the id that fills DNA slots."""


def text_config(*, tied: bool = True, layers: int = 2) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def tiny_policy(*, seed: int = 0, tied: bool = True, projector_kind: str = "mlp") -> DnaLlm:
    """Random weights, large enough that attention is sharp: what leaks or is stale then shows in the logits."""
    torch.manual_seed(seed)
    config = DnaLlmConfig(
        text_config=text_config(tied=tied), projector_kind=projector_kind, dna_hidden_size=WIDTH, dna_pad_token_id=PAD,
        encoder={"kind": "test"},
    )  # fmt: skip
    model = DnaLlm(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
        for marker in (model.projector.start_marker, model.projector.end_marker):
            marker.normal_(0.0, 0.5)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ...; <|dna_pad|> has the id PAD."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|endoftext|>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    add_dna_support(wrapped)
    return wrapped


def save_tiny(directory: Path, model: DnaLlm) -> Path:
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def features(rows: int, seed: int) -> FloatArray:
    """[rows, WIDTH], standard normal."""
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def prompt(slot_rows: Sequence[int], *, text: int = 6, seed: int = 0, problem_id: str = "p", key: str = "k") -> Prompt:
    """Text around slots of the given feature rows: 2 tokens, slot, 1 token, slot, ..., `text` tokens."""
    draw = np.random.default_rng(seed)
    ids = [int(token) for token in draw.integers(10, VOCABULARY, 2)]
    slots: list[DnaSlot] = []
    for index, rows in enumerate(slot_rows):
        slots.append(DnaSlot(len(ids), rows + 2, f"{key}-{index}"))
        ids += [PAD] * (rows + 2) + [int(draw.integers(10, VOCABULARY))]
    ids += [int(token) for token in draw.integers(10, VOCABULARY, text)]
    return Prompt(problem_id, tuple(ids), tuple(slots))


@torch.no_grad()
def reference_logprobs(
    model: DnaLlm, one: Prompt, arrays: Sequence[FloatArray], continuation: Sequence[int], temperature: float = 1.0
) -> FloatArray:
    """log p of each token of a continuation, by full logits of one sequence and a log-softmax."""
    inputs = sequence_inputs(one.token_ids, one.slots, [torch.from_numpy(array) for array in arrays], continuation)
    del inputs["target_ids"], inputs["predictor_positions"]
    logits = model(**inputs).logits[0]
    logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)
    start = len(one.token_ids) - 1
    return np.array([float(logprobs[start + t, token]) for t, token in enumerate(continuation)], dtype=np.float32)
