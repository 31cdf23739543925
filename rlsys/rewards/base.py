"""What a reward part is, and how a completion is read.

Every part sees the text that the policy wrote and the problem with its facts, and answers with one number. The one
invariant: a completion is read strictly. It is one think block, then one answer line, and nothing else; text that can
be read in two ways is not read at all, so that no part rewards a policy for hedging.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

from rlsys.types import Problem

THINK_START, THINK_END, ANSWER = "<think>", "</think>", "Answer:"

# DOTALL lets the thinking span lines; the answer is what is left of one line.
_COMPLETION = re.compile(
    rf"\s*{THINK_START}(?P<think>.*){THINK_END}\s*{ANSWER}[ \t]*(?P<answer>[^\n]*\S)\s*", flags=re.DOTALL
)


class RewardPart(Protocol):
    """Anything that scores one completion of one problem.

    The scorer's loop calls it once for each completion, under a time limit, and takes the value as the part's score.
    It may raise: the part then counts as failed for this completion, never as 0.
    """

    def __call__(self, problem: Problem, completion_text: str) -> float:
        """Return a value in [0, 1]; `completion_text` is what the policy wrote, special tokens left out."""
        ...


class ParsedCompletion(NamedTuple):
    """The two parts of a well-formed completion, outer white space removed."""

    think: str
    answer: str


def parse_completion(text: str) -> ParsedCompletion | None:
    """Split a completion into its thinking and its answer, or return None where it is not well-formed.

    Well-formed is: exactly one `<think>...</think>` at the start (any number of lines), then exactly one line
    `Answer: ...` that is not empty, then nothing. Each of the three marks must occur exactly once in the whole text.
    """
    if any(text.count(mark) != 1 for mark in (THINK_START, THINK_END, ANSWER)):
        return None
    found = _COMPLETION.fullmatch(text)
    return None if found is None else ParsedCompletion(found["think"].strip(), found["answer"].strip())
