from __future__ import annotations

from rlsys.rewards.format import format_reward
from tests.rlsys.rewards.problems import NONSENSE, RIGHT, answering


def test_a_well_formed_completion_is_rewarded_whatever_it_says():
    assert format_reward(NONSENSE, RIGHT) == 1.0
    assert format_reward(NONSENSE, answering("no idea")) == 1.0


def test_another_shape_is_not_rewarded():
    assert format_reward(NONSENSE, "p.Arg117Ter nonsense") == 0.0
