"""A byte-level BPE tokenizer trained on a task's own texts, for the language models that the project makes itself.

Stands before a tiny policy whose task has free text (KEGG), where the quickstart's tokenizer of whole words does not
reach. The one invariant: every text round-trips, because all 256 bytes are tokens before the first merge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlsys.data.prompts import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS

NUM_BYTES = 256


def train_bpe_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019) on `texts`.

    `vocabulary` counts all tokens, the special ones too; few or short texts end with fewer, so a model is sized by
    `len(tokenizer)`. The same texts give the same tokens.
    """
    smallest = NUM_BYTES + len(SPECIAL_TOKENS)
    assert vocabulary >= smallest, f"{vocabulary} tokens do not hold the bytes and special tokens ({smallest})"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Give a bare tokenizer the special tokens and the chat template that a DNA-LLM needs."""
    untyped: Any = tokenizer  # its stubs leave the elements of the list open
    untyped.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (END_OF_TURN, END_OF_TEXT)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
