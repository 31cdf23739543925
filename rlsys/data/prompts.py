"""Problem -> Prompt: the chat template, the tokens, and where the features of each DNA sequence will stand.

Stands between the problem cursor and the embedding service. A user turn holds one `<|dna_pad|>` for each sequence and
then the question; the assistant turn is opened and left to the policy. Each pad is then widened to the S + 2 positions
of its slot: a start marker, S feature rows, an end marker.

The one invariant: a prompt holds exactly one slot for each sequence of its problem, in their order. Text from a data
file can never make a slot or end a turn, because special tokens in it are refused.
"""

from __future__ import annotations

from typing import Any, Protocol

from rlsys.errors import CheckpointError, DataError
from rlsys.types import DnaSlot, Problem, Prompt

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
DNA_PAD = "<|dna_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, DNA_PAD)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}"
    "{{- message.content -}}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{{- '<|dna_pad|>' if part.type == 'dna' else part.text -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- endif -%}"
)
"""ChatML (as in Qwen3) whose messages may hold parts: `{"type": "dna"}` and `{"type": "text", "text": ...}`."""

NUM_MARKERS = 2
"""Learned rows around the features of a slot: one before, one after."""


class ChatTokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer (`PreTrainedTokenizerBase`)."""

    chat_template: Any

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that no text of a user may contain."""
        ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """Render messages; a string with `tokenize=False`."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, in which the special tokens are recognised."""
        ...

    def convert_tokens_to_ids(self, tokens: str) -> Any:
        """The id of one token."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """All tokens, the added ones too."""
        ...

    def add_special_tokens(self, special_tokens_dict: Any, replace_extra_special_tokens: bool = ...) -> int:
        """Add tokens that are never split, and return how many were new."""
        ...


class FeatureShape(Protocol):
    """What is asked of a DNA encoder here: sizes and names, no features."""

    def num_positions(self, sequence: str) -> int:
        """S: rows of the features of `sequence`. Raises DataError when the encoder cannot read it."""
        ...

    def key(self, sequence: str) -> str:
        """Content key of the features of `sequence`."""
        ...


class OverLongPromptError(DataError):
    """A prompt with more tokens than the engine and the learner, or more DNA than the encoder, have room for."""


def add_dna_support(tokenizer: ChatTokenizer) -> None:
    """Teach the tokenizer of a text-only checkpoint the DNA slot: the pad token, and our template in place of its own.

    A tokenizer whose template already places `<|dna_pad|>` keeps it. The number of tokens may grow by one: whoever
    makes the policy checks the embedding's rows. Raises CheckpointError where the tokenizer knows no ChatML turns.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (START_OF_TURN, END_OF_TURN) if token not in vocabulary]
    if missing:
        raise CheckpointError(
            f"the tokenizer has no {' and no '.join(missing)}, which delimit the turns of a chat; "
            "use a checkpoint of the Qwen family, or any other that speaks ChatML."
        )
    if DNA_PAD not in tokenizer.all_special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": [DNA_PAD]}, replace_extra_special_tokens=False)
    if not isinstance(tokenizer.chat_template, str) or DNA_PAD not in tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE


class PromptRenderer:
    """Renders problems for one policy (its tokenizer) and one encoder (its slot lengths)."""

    def __init__(self, tokenizer: ChatTokenizer, features: FeatureShape, max_prompt_tokens: int) -> None:
        """`max_prompt_tokens` is what is left of the engine's length once a whole completion is set aside.

        Raises CheckpointError where the tokenizer has no DNA slots (see `add_dna_support`).
        """
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (DNA_PAD, END_OF_TURN) if token not in vocabulary]
        if missing:
            raise CheckpointError(f"the policy's tokenizer has no {' and no '.join(missing)}: is this a DNA-LLM?")
        self._tokenizer = tokenizer
        self._features = features
        self._max_prompt_tokens = max_prompt_tokens
        self._dna_pad_id = vocabulary[DNA_PAD]
        # Longest first: a token that holds another one is named whole in messages.
        self._special_tokens = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self.end_of_turn_id = vocabulary[END_OF_TURN]
        """Ends an assistant turn: trained in demonstrations, and the stop token of rollouts."""

    def render(self, problem: Problem) -> Prompt:
        """Return the prompt of a problem.

        Raises OverLongPromptError when it or one of its sequences does not fit, and DataError when the question holds a
        special token.
        """
        self._refuse_special_tokens(problem, "question", problem.question)
        parts = [{"type": "dna"} for _ in problem.dna] + [{"type": "text", "text": problem.question}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        narrow_ids = self._tokenizer.encode(text, add_special_tokens=False)
        if narrow_ids.count(self._dna_pad_id) != len(problem.dna):
            raise CheckpointError(
                f"the policy's chat template makes {narrow_ids.count(self._dna_pad_id)} {DNA_PAD} of the "
                f"{len(problem.dna)} sequences of problem {problem.problem_id}; it must place one for each."
            )
        prompt = self._widen(problem, narrow_ids)
        if len(prompt.token_ids) > self._max_prompt_tokens:
            dna_tokens = sum(slot.length for slot in prompt.slots)
            raise OverLongPromptError(
                f"problem {problem.problem_id}: its prompt has {len(prompt.token_ids)} tokens ({dna_tokens} of DNA), "
                f"more than the {self._max_prompt_tokens} that rollout.max_model_tokens leaves beside "
                "rollout.max_new_tokens.\nRaise rollout.max_model_tokens, or shorten the input (KEGG: task.window_bp, "
                "or task.over_long=drop leaves such problems out and counts them)."
            )
        return prompt

    def demonstration_ids(self, problem: Problem) -> tuple[int, ...]:
        """Token ids of the assistant turn that SFT imitates, its end token included: stopping is learned too.

        Raises DataError when the problem has no demonstration, or one that holds a special token.
        """
        if not problem.demonstration:
            raise DataError(
                f"problem {problem.problem_id} has no demonstration (an empty reasoning), so SFT cannot imitate it; "
                "give one, or train without sft."
            )
        self._refuse_special_tokens(problem, "demonstration", problem.demonstration)
        return (*self._tokenizer.encode(problem.demonstration, add_special_tokens=False), self.end_of_turn_id)

    def _widen(self, problem: Problem, narrow_ids: list[int]) -> Prompt:
        token_ids: list[int] = []
        slots: list[DnaSlot] = []
        sequences = iter(problem.dna)
        for token_id in narrow_ids:
            if token_id == self._dna_pad_id:
                sequence = next(sequences)
                length = self._num_positions(problem, sequence) + NUM_MARKERS
                slots.append(DnaSlot(len(token_ids), length, self._features.key(sequence)))
                token_ids.extend([token_id] * length)
            else:
                token_ids.append(token_id)
        return Prompt(problem.problem_id, tuple(token_ids), tuple(slots))

    def _num_positions(self, problem: Problem, sequence: str) -> int:
        try:
            return self._features.num_positions(sequence)
        except DataError as error:  # its letters were checked where it came from, so this is its length
            raise OverLongPromptError(f"problem {problem.problem_id}: {error}") from error

    def _refuse_special_tokens(self, problem: Problem, field: str, text: str) -> None:
        for token in self._special_tokens:
            position = text.find(token)
            if position >= 0:
                raise DataError(
                    f"problem {problem.problem_id}: its {field} holds the special token {token} at character "
                    f"{position} (0-based), which would be read as structure and not as text; take it out."
                )
