"""Exact-answer accuracy on held-out problems, with 95 % intervals and the text-only floor beside it.

Stands after an evaluation's completions. Samples of one problem are alike, so the interval counts problems and not
samples. The one invariant: the same completions give the same numbers; nothing here is random.

Interval of the sampled accuracy: Wilson's (Wilson 1927) with the effective number of samples in the place of n, as
survey statistics does for clustered proportions (Dean and Pagano 2015, J. Surv. Stat. Methodol. 3(4)). With n problems,
m_i the mean of problem i over its samples, p the mean of the m_i, and s2 their sample variance (divisor n - 1):

    n_eff = p (1 - p) / (s2 / n),  at most the number of samples

p is then off by about sqrt(s2 / n), the standard error of clustered evaluations (Miller 2024, arXiv 2411.00640, eq. 4).
Unlike p +- 1.96 of it, the interval stays inside [0, 1] and keeps a width where everything is right or wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rlsys.rewards.answer import answer_reward
from rlsys.rewards.base import parse_completion
from rlsys.types import Problem

Z_95 = 1.959963984540054
"""Quantile of the standard normal distribution that leaves 2.5 % above it."""


class Interval(NamedTuple):
    """A 95 % interval of a proportion."""

    low: float
    high: float


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found. All numbers but `n`, `samples` and `parse_failures` are proportions in [0, 1]."""

    accuracy: float
    """Mean over problems of the share of sampled completions whose answer is exactly right."""
    interval: Interval
    """95 % interval of `accuracy`."""
    greedy_accuracy: float
    """Share of problems whose greedy completion is right."""
    greedy_interval: Interval
    """95 % interval of `greedy_accuracy` (Wilson)."""
    n: int
    """Problems."""
    samples: int
    """Sampled completions of all problems together; the greedy ones come on top."""
    floor: float
    """Accuracy that the best text-only guess has on the same problems."""
    parse_failures: int
    """Sampled completions that are not one think block and one answer line; they count as wrong."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values; intervals are `[low, high]`."""
        fields = asdict(self)
        return {**fields, "interval": list(self.interval), "greedy_interval": list(self.greedy_interval)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EvaluationResult:
        """The result that `to_dict` wrote."""
        intervals: dict[str, Any] = {name: Interval(*fields[name]) for name in ("interval", "greedy_interval")}
        return cls(**{**fields, **intervals})


def render_evaluation(result: EvaluationResult) -> str:
    """The result as a line for people."""
    return (
        f"accuracy {result.accuracy:.3f} [{result.interval.low:.3f}, {result.interval.high:.3f}], "
        f"greedy {result.greedy_accuracy:.3f}, text-only floor {result.floor:.3f}, {result.n} problems"
    )


def evaluate_texts(
    problems: Sequence[Problem], sampled_texts: Sequence[Sequence[str]], greedy_texts: Sequence[str], floor: float
) -> EvaluationResult:
    """Judge completions: `sampled_texts[i]` (one or more) and `greedy_texts[i]` answer `problems[i]`.

    An answer is right where the reward part `answer` says so.
    """
    correct = [
        [answer_reward(problem, text) == 1 for text in texts]
        for problem, texts in zip(problems, sampled_texts, strict=True)
    ]
    greedy = [answer_reward(problem, text) == 1 for problem, text in zip(problems, greedy_texts, strict=True)]
    accuracy, interval = clustered_accuracy(correct)
    return EvaluationResult(
        accuracy=accuracy,
        interval=interval,
        greedy_accuracy=sum(greedy) / len(greedy),
        greedy_interval=wilson_interval(sum(greedy) / len(greedy), len(greedy)),
        n=len(problems),
        samples=sum(map(len, correct)),
        floor=floor,
        parse_failures=sum(parse_completion(text) is None for texts in sampled_texts for text in texts),
    )


def clustered_accuracy(correct: Sequence[Sequence[bool]]) -> tuple[float, Interval]:
    """Mean over problems of the share of correct samples, and its 95 % interval (see the module's docstring).

    `correct[i]` holds the samples of problem i, one or more.
    """
    assert correct, "an evaluation has problems"
    assert all(correct), "every problem has a sample"
    shares = [sum(samples) / len(samples) for samples in correct]
    num_problems, num_samples = len(shares), sum(map(len, correct))
    mean = math.fsum(shares) / num_problems
    squares = math.fsum((share - mean) ** 2 for share in shares)
    if squares == 0:
        # No spread between problems to learn from: all alike and all right or wrong counts each problem once.
        effective = num_problems if mean in (0, 1) else num_samples
    else:
        variance_of_mean = squares / (num_problems - 1) / num_problems
        effective = min(num_samples, mean * (1 - mean) / variance_of_mean)
    return mean, wilson_interval(mean, effective)


def wilson_interval(proportion: float, n: float) -> Interval:
    """Wilson's 95 % score interval (Wilson 1927, J. Am. Stat. Assoc. 22) of a proportion among `n` > 0 draws."""
    z2 = Z_95**2
    centre = (proportion + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(proportion * (1 - proportion) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))
