from __future__ import annotations

import pytest

from rlsys.rewards.base import ParsedCompletion, parse_completion


def test_a_completion_is_thinking_and_an_answer():
    assert parse_completion("<think>a > b</think>\nAnswer: yes") == ParsedCompletion("a > b", "yes")


def test_thinking_may_span_lines():
    text = "<think>\nStep 1.\n\nStep 2.\n</think>\n\nAnswer: prion disease\n"
    assert parse_completion(text) == ParsedCompletion("Step 1.\n\nStep 2.", "prion disease")


def test_empty_thinking_is_still_thinking():
    assert parse_completion("<think></think>Answer: yes") == ParsedCompletion("", "yes")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Answer: yes",
        "<think>a</think>",
        "<think>a</think>\nAnswer:",
        "<think>a</think>\nAnswer:   \n",
        "<think>a</think>\nyes",
        "<think>a\nAnswer: yes",
        "a</think>\nAnswer: yes",
        "so <think>a</think>\nAnswer: yes",
        "<think>a</think> and so\nAnswer: yes",
        "<think>a</think>\nAnswer: yes\nAnswer: no",
        "<think>a</think>\nAnswer: yes\nor no",
        "<think>Answer: yes</think>\nAnswer: no",
        "<think>a</think><think>b</think>\nAnswer: yes",
        "<think>a<think>b</think></think>\nAnswer: yes",
        "<think>a</think>\nAnswer: yes</think>",
        "<think>a</think>\nAnswer: <think>yes",
        "</think>a<think>\nAnswer: yes",
        "<think>a</think>\nanswer: yes",
        "Answer: yes\n<think>a</think>",
    ],
)
def test_text_that_could_be_read_in_two_ways_is_not_read(text: str):
    assert parse_completion(text) is None
