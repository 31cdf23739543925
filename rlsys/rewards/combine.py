"""From named parts to one reward."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rlsys.types import PartScore, PartStatus


def weighted_sum(parts: Mapping[str, PartScore], weights: Mapping[str, float]) -> float:
    """Return sum_k weight_k * value_k, or NaN where any part is not ok.

    The NaN is deliberate: a part that could not be computed says nothing about the completion, and a 0 in its place
    would teach the policy to avoid whatever breaks our own code.
    """
    assert parts.keys() == weights.keys(), f"parts {sorted(parts)} do not match weights {sorted(weights)}"
    if any(part.status is not PartStatus.OK for part in parts.values()):
        return math.nan
    return math.fsum(weights[name] * part.value for name, part in parts.items())
