import re

import pytest

from rlsys.metrics import METRICS, Metrics, Reduction, spec_of

AREAS = "train|off_policy|length|reward|group|staleness|rollout|embed|evaluation|time|throughput|tokens"


def test_each_name_is_reduced_in_its_own_way() -> None:
    metrics = Metrics()
    for value in (3.0, 1.0, 2.0):
        metrics.record("staleness/mean", value)
        metrics.record("staleness/max", value)
        metrics.record("throughput/trained_trajectories", value)
        metrics.record("train/loss", value)
    assert metrics.flush() == {
        "staleness/mean": 2.0,
        "staleness/max": 3.0,
        "throughput/trained_trajectories": 6.0,
        "train/loss": 2.0,
    }


def test_means_of_means_are_weighted() -> None:
    metrics = Metrics()
    metrics.record("reward/total", 1.0, weight=3)
    metrics.record("reward/total", 0.0, weight=1)
    assert metrics.flush() == {"reward/total": 0.75}


def test_a_flush_begins_anew() -> None:
    metrics = Metrics()
    metrics.update({"train/loss": 1.0, "reward/total": 0.5})
    assert metrics.flush() == {"train/loss": 1.0, "reward/total": 0.5}
    assert metrics.flush() == {}


@pytest.mark.parametrize("name", ["train/lost", "loss", "rewards/total", "staleness/"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(AssertionError, match=f"metric '{name}' is not listed"):
        Metrics().record(name, 1.0)


def test_reward_parts_name_themselves() -> None:
    metrics = Metrics()
    metrics.record("reward/my_own_part", 0.0)
    metrics.record("reward/my_own_part", 1.0)
    assert metrics.flush() == {"reward/my_own_part": 0.5}


def test_a_mean_over_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="mean over 0 things"):
        Metrics().record("reward/total", 1.0, weight=0)


@pytest.mark.parametrize("name", METRICS)
def test_names_are_area_and_quantity_with_a_description(name: str) -> None:
    assert re.fullmatch(rf"({AREAS})/[a-z0-9_]+", name)
    assert METRICS[name].description
    assert spec_of(name).reduction in Reduction
