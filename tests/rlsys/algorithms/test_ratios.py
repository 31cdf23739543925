import math

import pytest
import torch

from rlsys.algorithms.ratios import RatioSums, ratio_metrics, ratio_sums, same_version_mask
from rlsys.metrics import METRICS


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_sums_are_those_of_the_ratios() -> None:
    # ρ = 2 and 0.5; |log ρ| = log 2 both; k3: 2 - 1 - log 2 and 0.5 - 1 + log 2, mean 0.25
    sums = ratio_sums(logs(0.4, 0.1), logs(0.2, 0.2), torch.ones(2), clipped=torch.tensor([1.0, 0.0]))
    assert sums.tokens == 2
    assert sums.ratio_mean == pytest.approx(1.25)
    assert sums.kl_k3 == pytest.approx(0.25)
    assert sums.abs_diff_mean == pytest.approx(math.log(2))
    assert sums.ess == pytest.approx(2.5**2 / (2 * 4.25))
    assert sums.clipped_fraction == 0.5


def test_the_greatest_difference_counts_in_both_directions() -> None:
    sums = ratio_sums(logs(0.3, 0.05), logs(0.2, 0.5), torch.ones(2))
    assert sums.abs_diff_max == pytest.approx(math.log(10))
    assert sums.clipped_fraction == 0


def test_masked_tokens_do_not_count() -> None:
    logprobs, behavior = torch.tensor([-1.0, math.nan, -math.inf]), torch.tensor([-1.5, 0.0, -1.0])
    masked = ratio_sums(logprobs, behavior, torch.tensor([1.0, 0.0, 0.0]), clipped=torch.ones(3))
    assert masked == ratio_sums(logprobs[:1], behavior[:1], torch.ones(1), clipped=torch.ones(1))


def test_parts_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, behavior = -torch.rand(2, 30, generator=generator)
    clipped = (torch.rand(30, generator=generator) > 0.5).float()
    whole = ratio_sums(logprobs, behavior, torch.ones(30), clipped)
    cuts = [slice(0, 7), slice(7, 8), slice(8, 30)]
    parts = [ratio_sums(logprobs[cut], behavior[cut], torch.ones_like(logprobs[cut]), clipped[cut]) for cut in cuts]
    added = sum(parts, RatioSums.zero())
    for name, value in vars(whole).items():
        assert getattr(added, name) == pytest.approx(value, rel=1e-14), name


def test_no_tokens_are_no_difference() -> None:
    empty = ratio_sums(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    assert empty == RatioSums.zero()
    assert (empty.kl_k3, empty.ratio_mean, empty.ess, empty.clipped_fraction, empty.abs_diff_max) == (0, 1, 1, 0, 0)
    assert ratio_metrics(empty, empty) == {}


def test_a_tiny_mismatch_is_measured_and_not_rounded_away() -> None:
    # k3 for small x = log ρ is x²/2: 5e-9 at x = 1e-4, below what float32 keeps of 1 + 1e-4.
    logprobs = torch.tensor([-1.0], dtype=torch.float64)
    assert ratio_sums(logprobs + 1e-4, logprobs, torch.ones(1)).kl_k3 == pytest.approx(5e-9, rel=1e-3)


def test_mismatch_is_measured_on_the_learners_own_version_only() -> None:
    mask, versions = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([6, 7, 7, 7])
    same = same_version_mask(mask, versions, learner_version=7)
    assert same.tolist() == [0, 1, 0, 1]
    logprobs, behavior = torch.tensor([-1.0, -1.0, -1.0, -1.0]), torch.tensor([-3.0, -1.0, -5.0, -1.5])
    metrics = ratio_metrics(ratio_sums(logprobs, behavior, mask), ratio_sums(logprobs, behavior, same))
    assert metrics["train/logprob_abs_max"] == 2
    assert metrics["train/mismatch_abs_max"] == 0.5
    assert metrics["train/mismatch_abs_mean"] == 0.25
    assert metrics["train/mismatch_tokens"] == 2


def test_without_tokens_of_the_learners_version_no_mismatch_is_reported() -> None:
    metrics = ratio_metrics(ratio_sums(torch.zeros(1), torch.zeros(1), torch.ones(1)), RatioSums.zero())
    assert metrics["train/mismatch_tokens"] == 0
    assert "train/mismatch_kl" not in metrics


def test_the_metrics_are_listed() -> None:
    sums = ratio_sums(torch.zeros(1), torch.zeros(1), torch.ones(1))
    assert ratio_metrics(sums, sums).keys() <= METRICS.keys()
