import math

import pytest
import torch

from rlsys.algorithms.ratios import RatioSums, add_sums, ratio_metrics, ratio_sums
from rlsys.metrics import MAX_STALENESS, METRICS


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def all_sums(
    logprobs: torch.Tensor, behavior: torch.Tensor, mask: torch.Tensor, **diagnostics: torch.Tensor
) -> RatioSums:
    """Of tokens that are all of the learner's version."""
    return ratio_sums(logprobs, behavior, mask, torch.zeros_like(mask).long(), **diagnostics).get(0, RatioSums.zero())


def test_sums_are_those_of_the_ratios() -> None:
    # ρ = 2 and 0.5; |log ρ| = log 2 both; k3: 2 - 1 - log 2 and 0.5 - 1 + log 2, mean 0.25
    sums = all_sums(
        logs(0.4, 0.1), logs(0.2, 0.2), torch.ones(2), clipped=torch.tensor([1.0, 0.0]), masked=torch.tensor([1.0, 1.0])
    )
    assert sums.tokens == 2
    assert sums.ratio_mean == pytest.approx(1.25)
    assert sums.kl_k3 == pytest.approx(0.25)
    assert sums.abs_diff_mean == pytest.approx(math.log(2))
    assert sums.ess == pytest.approx(2.5**2 / (2 * 4.25))
    assert sums.clipped_fraction == 0.5
    assert sums.masked_fraction == 1


def test_the_greatest_difference_counts_in_both_directions() -> None:
    sums = all_sums(logs(0.3, 0.05), logs(0.2, 0.5), torch.ones(2))
    assert sums.abs_diff_max == pytest.approx(math.log(10))
    assert (sums.clipped_fraction, sums.masked_fraction) == (0, 0)


def test_masked_tokens_do_not_count() -> None:
    logprobs, behavior = torch.tensor([-1.0, math.nan, -math.inf]), torch.tensor([-1.5, 0.0, -1.0])
    ones, staleness = torch.ones(3), torch.tensor([2, -7, 2])
    masked = ratio_sums(logprobs, behavior, torch.tensor([1.0, 0.0, 0.0]), staleness, clipped=ones, masked=ones)
    alone = ratio_sums(logprobs[:1], behavior[:1], ones[:1], staleness[:1], clipped=ones[:1], masked=ones[:1])
    assert masked == alone
    assert masked.keys() == {2}


def random_arguments() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs, behavior = -torch.rand(2, 5, 12, generator=generator)
    draw = torch.rand(3, 5, 12, generator=generator)
    return {
        "logprobs": logprobs,
        "behavior_logprobs": behavior,
        "mask": (draw[0] > 0.2).float(),
        "staleness": torch.randint(0, 12, (5, 12), generator=generator),
        "clipped": (draw[1] > 0.5).float(),
        "masked": (draw[2] > 0.7).float(),
    }


def test_sums_by_staleness_are_those_of_each_staleness_alone() -> None:
    arguments = random_arguments()
    sums = ratio_sums(**arguments)
    assert set(sums) == set(range(MAX_STALENESS + 1))
    for stale, of_stale in sums.items():
        same = arguments["staleness"].clamp(max=8) == stale
        chosen = {name: value[same & (arguments["mask"] > 0)] for name, value in arguments.items()}
        del chosen["staleness"]
        alone = all_sums(chosen.pop("logprobs"), chosen.pop("behavior_logprobs"), **chosen)
        for name, value in vars(alone).items():
            assert getattr(of_stale, name) == pytest.approx(value, rel=1e-12), name


def test_parts_add_up_to_the_whole() -> None:
    arguments = random_arguments()
    whole = ratio_sums(**arguments)
    parts = [ratio_sums(**{name: value[rows] for name, value in arguments.items()})
             for rows in (slice(0, 1), slice(1, 4), slice(4, 5))]  # fmt: skip
    added = add_sums(parts[::-1])
    assert list(added) == list(whole)
    for stale, sums in whole.items():
        for name, value in vars(sums).items():
            assert getattr(added[stale], name) == pytest.approx(value, rel=1e-14), name


def test_a_ratio_beyond_all_bounds_leaves_the_sums_finite() -> None:
    sums = all_sums(torch.tensor([0.0, -800.0]), torch.tensor([-800.0, 0.0]), torch.ones(2))
    assert math.isfinite(sums.ratio_mean)
    assert math.isfinite(sums.kl_k3)
    assert 0 < sums.ess <= 1


def test_no_tokens_are_no_difference() -> None:
    for size in (0, 2):
        zeros = torch.zeros(size)
        assert ratio_sums(zeros, zeros, zeros, zeros.long()) == {}
    empty = RatioSums.zero()
    assert (empty.kl_k3, empty.ratio_mean, empty.ess, empty.clipped_fraction, empty.abs_diff_max) == (0, 1, 1, 0, 0)
    assert ratio_metrics({}) == {}
    assert add_sums([]) == {}


def test_a_tiny_mismatch_is_measured_and_not_rounded_away() -> None:
    # k3 for small x = log ρ is x²/2: 5e-9 at x = 1e-4, below what float32 keeps of 1 + 1e-4.
    logprobs = torch.tensor([-1.0], dtype=torch.float64)
    assert all_sums(logprobs + 1e-4, logprobs, torch.ones(1)).kl_k3 == pytest.approx(5e-9, rel=1e-3)


def test_a_token_of_a_version_to_come_is_refused() -> None:
    with pytest.raises(AssertionError, match="version"):
        ratio_sums(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.tensor([-1]))


def test_mismatch_is_measured_on_the_learners_own_version_only() -> None:
    mask, staleness = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1, 0, 0, 0])
    logprobs, behavior = torch.tensor([-1.0, -1.0, -1.0, -1.0]), torch.tensor([-3.0, -1.0, -5.0, -1.5])
    metrics = ratio_metrics(ratio_sums(logprobs, behavior, mask, staleness))
    assert metrics["train/logprob_abs_max"] == 2
    assert metrics["train/mismatch_abs_max"] == 0.5
    assert metrics["train/mismatch_abs_mean"] == 0.25
    assert metrics["train/mismatch_tokens"] == 2
    assert metrics["off_policy/logprob_abs_mean_staleness_0"] == 0.25
    assert metrics["off_policy/logprob_abs_mean_staleness_1"] == 2


def test_each_staleness_has_its_own_numbers() -> None:
    # staleness 1: ρ = 2 and 1/4, k3 is 2 - 1 - log 2 and 1/4 - 1 + 2 log 2; staleness 2: ρ = 4, one token
    sums = ratio_sums(
        logs(0.4, 0.05, 0.8),
        logs(0.2, 0.2, 0.2),
        torch.ones(3),
        torch.tensor([1, 1, 2]),
        clipped=torch.tensor([1.0, 0.0, 0.0]),
        masked=torch.tensor([0.0, 0.0, 1.0]),
    )
    metrics = ratio_metrics(sums)
    found = {name: value for name, value in metrics.items() if name.startswith("off_policy/")}
    assert found == pytest.approx({
        "off_policy/logprob_abs_mean_staleness_1": 1.5 * math.log(2),
        "off_policy/logprob_abs_max_staleness_1": 2 * math.log(2),
        "off_policy/kl_staleness_1": (0.25 + math.log(2)) / 2,
        "off_policy/ratio_mean_staleness_1": 1.125,
        "off_policy/ess_staleness_1": 2.25**2 / (2 * (4 + 1 / 16)),
        "off_policy/clipped_fraction_staleness_1": 0.5,
        "off_policy/masked_fraction_staleness_1": 0.0,
        "off_policy/logprob_abs_mean_staleness_2": math.log(4),
        "off_policy/logprob_abs_max_staleness_2": math.log(4),
        "off_policy/kl_staleness_2": 4 - 1 - math.log(4),
        "off_policy/ratio_mean_staleness_2": 4.0,
        "off_policy/ess_staleness_2": 1.0,
        "off_policy/clipped_fraction_staleness_2": 0.0,
        "off_policy/masked_fraction_staleness_2": 1.0,
    })  # fmt: skip


def test_probed_tokens_count_in_the_mismatch_and_in_nothing_else() -> None:
    ones = torch.ones(2)
    step = ratio_sums(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -3.0]), ones, torch.tensor([0, 1]))
    probed = all_sums(torch.tensor([-1.0, -2.0]), torch.tensor([-1.25, -2.0]), ones)
    without, found = ratio_metrics(step), ratio_metrics(step, probed)
    # One token of the step differs by 0.5, those of the probe by 0.25 and 0.
    assert (found["train/mismatch_tokens"], found["train/mismatch_abs_max"]) == (3, 0.5)
    assert found["train/mismatch_abs_mean"] == pytest.approx(0.25)
    assert found["train/mismatch_kl"] > 0
    assert [name for name in found if found[name] != without[name]] == [
        "train/mismatch_tokens",
        "train/mismatch_kl",
        "train/mismatch_abs_mean",
    ]
    stale = {1: step[1]}
    assert ratio_metrics(stale, probed)["train/mismatch_abs_mean"] == pytest.approx(0.125)
    assert ratio_metrics(stale, probed)["train/mismatch_tokens"] == 2


def test_without_tokens_of_the_learners_version_no_mismatch_is_reported() -> None:
    metrics = ratio_metrics(ratio_sums(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1).long()))
    assert metrics["train/mismatch_tokens"] == 0
    assert "train/mismatch_kl" not in metrics
    assert "off_policy/kl_staleness_0" not in metrics


def test_the_metrics_are_listed() -> None:
    assert ratio_metrics(ratio_sums(**random_arguments())).keys() <= METRICS.keys()
