"""The tokenizer of tiny policies for free text."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from rlsys.data.prompts import DNA_PAD, END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS
from rlsys.models.tiny_bpe import train_bpe_tokenizer

TEXTS = ["the gene encodes the kinase", "the variant disrupts the kinase", "the pathway"]
TOKENIZER = train_bpe_tokenizer(TEXTS, 280)


@given(st.text())
def test_every_text_comes_back_from_its_tokens(text: str) -> None:
    if not any(token in text for token in SPECIAL_TOKENS):
        assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


def test_frequent_words_become_single_tokens() -> None:
    assert len(TOKENIZER.encode(" the", add_special_tokens=False)) == 1
    assert len(TOKENIZER.encode(" xqz", add_special_tokens=False)) == 4


def test_the_vocabulary_is_as_large_as_asked_for_and_counts_the_special_tokens() -> None:
    assert len(TOKENIZER) == 280
    assert max(TOKENIZER.get_vocab().values()) == 279


def test_short_texts_end_with_the_bytes_and_their_few_merges() -> None:
    # "ab": 256 bytes, one merge, 4 special tokens.
    assert len(train_bpe_tokenizer(["ab ab"], 1000)) == 256 + 2 + 4  # "ab" and " ab"


def test_special_tokens_are_single_and_the_turn_ends_the_sequence() -> None:
    ids = TOKENIZER.encode("".join(SPECIAL_TOKENS), add_special_tokens=False)
    assert len(ids) == len(SPECIAL_TOKENS)
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == (END_OF_TURN, END_OF_TEXT)
    assert DNA_PAD in TOKENIZER.all_special_tokens


def test_the_same_texts_give_the_same_tokens_in_another_process() -> None:
    program = (
        "from rlsys.models.tiny_bpe import train_bpe_tokenizer\n"
        f"print(train_bpe_tokenizer({TEXTS!r}, 280).backend_tokenizer.to_str())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == TOKENIZER.backend_tokenizer.to_str()
