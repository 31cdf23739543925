from __future__ import annotations

from dataclasses import replace

import pytest

from rlsys.rewards.amino_acid import amino_acid_reward
from tests.rlsys.rewards.problems import NONSENSE, RIGHT, thinking


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("C>T CGA>TGA Arg>Ter", 1.0),
        ("Arg>Trp", 0.5),
        ("Gly>Ter", 0.5),
        ("Ter>Arg", 0.0),
        ("Gly>Trp", 0.0),
        ("Arg>Ter, I repeat: Arg>Ter", 1.0),
        ("Arg>Ter Arg>Gly", 0.0),  # hedging
        ("Arg>Xyz", 0.0),
        ("Arg", 0.0),
        ("", 0.0),
    ],
)
def test_each_amino_acid_of_the_one_stated_change_counts_half(text: str, reward: float):
    assert amino_acid_reward(NONSENSE, thinking(text)) == reward


def test_a_malformed_completion_is_not_rewarded():
    assert amino_acid_reward(NONSENSE, "Arg>Ter") == 0.0


def test_a_problem_without_the_facts_is_an_error_and_not_a_zero():
    with pytest.raises(KeyError):
        amino_acid_reward(replace(NONSENSE, facts={}), RIGHT)
