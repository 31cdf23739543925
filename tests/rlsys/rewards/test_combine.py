from __future__ import annotations

import math

import pytest

from rlsys.rewards.combine import weighted_sum
from rlsys.types import PartScore, PartStatus


def test_the_reward_is_the_weighted_sum_of_the_parts():
    parts = {"format": PartScore(1.0, PartStatus.OK), "answer": PartScore(0.5, PartStatus.OK)}
    # 0.2 * 1 + 3 * 0.5
    assert weighted_sum(parts, {"format": 0.2, "answer": 3.0}) == pytest.approx(1.7)


@pytest.mark.parametrize("status", [PartStatus.FAILED, PartStatus.TIMED_OUT])
def test_one_part_without_a_value_makes_the_reward_nan(status: PartStatus):
    parts = {"format": PartScore(1.0, PartStatus.OK), "mine": PartScore(math.nan, status)}
    assert math.isnan(weighted_sum(parts, {"format": 1.0, "mine": 0.0}))
