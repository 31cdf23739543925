"""Prompts: one slot for each sequence, and no text that can pretend to be structure."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlsys.data.prompts import (
    CHAT_TEMPLATE,
    DNA_PAD,
    END_OF_TURN,
    OverLongPromptError,
    PromptRenderer,
    add_dna_support,
)
from rlsys.errors import CheckpointError, DataError
from rlsys.models.tiny_bpe import train_bpe_tokenizer
from rlsys.types import DnaSlot, Problem

TOKENIZER: Any = train_bpe_tokenizer([], 300)  # bytes only: one token for each ASCII letter
PAD_ID = TOKENIZER.convert_tokens_to_ids(DNA_PAD)


class Codons:
    """An encoder of three letters to a position."""

    def num_positions(self, sequence: str) -> int:
        return len(sequence) // 3

    def key(self, sequence: str) -> str:
        return f"codons:{sequence}"


def renderer(max_prompt_tokens: int = 1000, tokenizer: Any = TOKENIZER) -> PromptRenderer:
    return PromptRenderer(tokenizer, Codons(), max_prompt_tokens)


def problem(question: str = "Which?", dna: tuple[str, ...] = ("ACGTTT", "ACG"), demonstration: str = "") -> Problem:
    return Problem("kegg:7", question, dna, "this", demonstration)


def stock_tokenizer(*special: str, template: str | None = "{{ messages }}") -> Any:
    """A text-only checkpoint's tokenizer: bytes, and the named special tokens."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare: Any = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=bare, additional_special_tokens=list(special), chat_template=template)


# ---------------------------------------------------------------- rendering


def test_a_prompt_is_the_sequences_then_the_question_then_an_open_turn() -> None:
    prompt = renderer().render(problem())
    # S is 2 and 1 positions; a marker on each side makes 4 and 3 tokens.
    assert TOKENIZER.decode(prompt.token_ids) == (
        f"<|im_start|>user\n{DNA_PAD * 7}Which?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_slots_are_where_the_pads_are() -> None:
    prompt = renderer().render(problem())
    # <|im_start|>, u, s, e, r, newline: the first slot starts at 6.
    assert prompt.slots == (DnaSlot(6, 4, "codons:ACGTTT"), DnaSlot(10, 3, "codons:ACG"))
    assert [index for index, token in enumerate(prompt.token_ids) if token == PAD_ID] == list(range(6, 13))


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_problem_may_have_any_number_of_sequences(number: int) -> None:
    prompt = renderer().render(problem(dna=("ACGACG",) * number))
    assert [slot.length for slot in prompt.slots] == [4] * number
    assert prompt.token_ids.count(PAD_ID) == 4 * number


def test_a_prompt_of_exactly_the_limit_fits_and_one_token_more_does_not() -> None:
    length = len(renderer().render(problem()).token_ids)
    assert len(renderer(length).render(problem()).token_ids) == length
    with pytest.raises(OverLongPromptError) as caught:
        renderer(length - 1).render(problem())
    message = str(caught.value)
    assert f"problem kegg:7: its prompt has {length} tokens (7 of DNA), more than the {length - 1}" in message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize("token", [DNA_PAD, END_OF_TURN, "<|im_start|>", "<|endoftext|>"])
def test_a_special_token_in_a_question_is_refused(token: str) -> None:
    with pytest.raises(DataError) as caught:
        renderer().render(problem(question=f"What is {token}?"))
    assert f"problem kegg:7: its question holds the special token {token} at character 8" in str(caught.value)


# ---------------------------------------------------------------- demonstrations


def test_a_demonstration_ends_with_the_end_token() -> None:
    ids = renderer().demonstration_ids(problem(demonstration="<think>C>T</think>\nAnswer: this"))
    assert ids[-1] == renderer().end_of_turn_id
    assert TOKENIZER.decode(ids) == f"<think>C>T</think>\nAnswer: this{END_OF_TURN}"


def test_prompt_and_demonstration_together_are_the_whole_chat() -> None:
    with_demonstration = problem(demonstration="Answer: this")
    prompt = renderer().render(with_demonstration)
    joined = TOKENIZER.decode([*prompt.token_ids, *renderer().demonstration_ids(with_demonstration)])
    parts = [*([{"type": "dna"}] * 7), {"type": "text", "text": "Which?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Answer: this"}]
    assert joined + "\n" == TOKENIZER.apply_chat_template(chat, tokenize=False)


def test_a_problem_without_a_demonstration_cannot_be_imitated() -> None:
    with pytest.raises(DataError, match="problem kegg:7 has no demonstration"):
        renderer().demonstration_ids(problem())


def test_a_special_token_in_a_demonstration_is_refused() -> None:
    with pytest.raises(DataError, match="its demonstration holds the special token"):
        renderer().demonstration_ids(problem(demonstration=f"a{END_OF_TURN}b"))


# ---------------------------------------------------------------- tokenizers


def test_a_stock_tokenizer_learns_the_slot_and_our_template() -> None:
    tokenizer = stock_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    before = len(tokenizer)
    add_dna_support(tokenizer)
    add_dna_support(tokenizer)
    assert len(tokenizer) == before + 1
    assert tokenizer.chat_template == CHAT_TEMPLATE
    prompt = renderer(tokenizer=tokenizer).render(problem())
    assert tokenizer.decode(prompt.token_ids) == TOKENIZER.decode(renderer().render(problem()).token_ids)
    assert "<|endoftext|>" in tokenizer.all_special_tokens


def test_a_template_that_knows_the_slot_is_kept() -> None:
    template = CHAT_TEMPLATE.replace("assistant", "Assistant")
    tokenizer = stock_tokenizer("<|im_start|>", "<|im_end|>", DNA_PAD, template=template)
    add_dna_support(tokenizer)
    assert tokenizer.chat_template == template


def test_a_tokenizer_without_turns_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"has no <\|im_end\|>, which delimit"):
        add_dna_support(stock_tokenizer("<|im_start|>"))


def test_a_policy_without_slots_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"has no <\|dna_pad\|>: is this a DNA-LLM"):
        renderer(tokenizer=stock_tokenizer("<|im_start|>", "<|im_end|>"))


def test_a_template_that_loses_sequences_is_refused() -> None:
    tokenizer = stock_tokenizer("<|im_start|>", "<|im_end|>", DNA_PAD, template="{{ '<|dna_pad|>' }}")
    with pytest.raises(CheckpointError, match=r"makes 1 <\|dna_pad\|> of the 2 sequences of problem kegg:7"):
        renderer(tokenizer=tokenizer).render(problem())
