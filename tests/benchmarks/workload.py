"""Workload W, which every part of the end-to-end benchmark runs: a model, prompts, a reward, and sizes.

A Qwen3 of 5 M parameters writes completions of geometric length (mean about 80 tokens), 16 prompts of 64 random tokens
and 8 completions of each in a step. Everything follows from seeds, so that two parts see the same model and prompts.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from rlsys.data.prompts import DNA_PAD, END_OF_TURN, START_OF_TURN
from rlsys.types import Problem, Prompt

VOCABULARY = 4096
PROMPTS_PER_STEP = 16
GROUP_SIZE = 8
TRAJECTORIES_PER_STEP = PROMPTS_PER_STEP * GROUP_SIZE
PROMPT_TOKENS = 64
MAX_NEW_TOKENS = 128
MAX_MODEL_TOKENS = 256
LEARNING_RATE = 1e-5

PAD_ID = 0
END_IDS = range(2, 34)
"""32 of 4096 ids end a completion. The untrained policy is nearly uniform: it ends with 1/128 at each token."""
MARK_IDS = {START_OF_TURN: 34, END_OF_TURN: 35, DNA_PAD: 36}
"""What a DNA-LLM's tokenizer needs. In the vocabulary already, so that its embedding does not grow."""
FIRST_WORD_ID = 64
"""Prompts are drawn from the ids from here on."""


def make_text_model(directory: Path) -> Path:
    """Write W's language model with its tokenizer as a Hugging Face directory, where it is not there yet."""
    if (directory / "config.json").exists():
        return directory
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    _tokenizer().save_pretrained(directory)
    torch.manual_seed(0)
    ends = list(END_IDS)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        dtype="float32",
        eos_token_id=ends,
        pad_token_id=PAD_ID,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).float()
    generation: Any = model.generation_config
    generation.eos_token_id, generation.pad_token_id = ends, PAD_ID
    generation.do_sample, generation.top_k, generation.top_p = True, 0, 1.0
    model.save_pretrained(directory)
    return directory


def _tokenizer() -> Any:
    """One word for each id: `w64` is 64."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {number: f"w{number}" for number in range(VOCABULARY)}
    words |= {PAD_ID: "<pad>", 1: "<unk>"} | {number: f"<eos{number}>" for number in END_IDS}
    words |= {number: mark for mark, number in MARK_IDS.items()}
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in words.items()}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=words[END_IDS[0]],
        additional_special_tokens=list(MARK_IDS),
    )
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return wrapped


def prompt_texts(number: int, seed: int = 1) -> list[str]:
    """Prompts of 64 words each."""
    chance = random.Random(seed)
    return [
        " ".join(f"w{chance.randrange(FIRST_WORD_ID, VOCABULARY)}" for _ in range(PROMPT_TOKENS)) for _ in range(number)
    ]


def problems(number: int, seed: int = 1) -> tuple[Problem, ...]:
    """The prompts as problems without DNA and without an answer."""
    return tuple(Problem(f"w-{place}", text, (), "", "") for place, text in enumerate(prompt_texts(number, seed)))


class WordRenderer:
    """Renders W's problems word by word, without the turns of a chat: 64 tokens are 64 tokens everywhere."""

    def render(self, problem: Problem) -> Prompt:
        """The ids that the words name."""
        return Prompt(problem.problem_id, tuple(int(word[1:]) for word in problem.question.split()), ())

    def demonstration_ids(self, problem: Problem) -> tuple[int, ...]:
        """There is no warm start."""
        raise AssertionError(f"{problem.problem_id}: workload W has no demonstrations")


def even_fraction(token_ids: list[int]) -> float:
    """The reward: the share of even ids. Cheap, and it varies inside a group."""
    return sum(number % 2 == 0 for number in token_ids) / max(1, len(token_ids))


def even_words(problem: Problem, completion: str) -> float:
    """The reward as a user's reward part, from the decoded words `w12 w13`; special tokens do not count."""
    return even_fraction([int(word[1:]) for word in completion.split() if word.startswith("w")])
