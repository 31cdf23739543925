from __future__ import annotations

import pytest

from rlsys.rewards.answer import answer_reward, normalise
from tests.rlsys.rewards.problems import NONSENSE, RIGHT, answering


def test_the_known_answer_is_rewarded():
    assert answer_reward(NONSENSE, RIGHT) == 1.0


def test_case_spacing_and_a_full_stop_do_not_matter():
    assert answer_reward(NONSENSE, answering("  P.ARG117TER   Nonsense. ")) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "p.Arg117Ter missense",
        "p.Arg117Ter",
        "p.Arg117Ter nonsense, p.Arg118Ter nonsense",
        "p.Arg117Ter nonsense p.Arg117Ter nonsense",
        "not p.Arg117Ter nonsense",
        "p.Arg1170Ter nonsense",
        "p.Arg117Ter nonsense\np.Arg118Ter nonsense",
    ],
)
def test_anything_else_is_not_rewarded(answer: str):
    assert answer_reward(NONSENSE, answering(answer)) == 0.0


def test_a_right_answer_without_thinking_is_not_rewarded():
    assert answer_reward(NONSENSE, "Answer: p.Arg117Ter nonsense") == 0.0


def test_normalising_twice_changes_nothing_more():
    assert normalise(normalise("  Prion \t Disease. ")) == normalise("  Prion \t Disease. ") == "prion disease"
