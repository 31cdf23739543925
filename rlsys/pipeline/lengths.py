"""Length bias: whether the completions that are trained are as long as those that are generated.

Whatever drops groups on their way from the rollout workers to the loss (filters, failures, an age limit) may prefer
short ones or long ones, and then the policy learns a length that nobody asked for. The controller tells the log the
lengths of every finished group when it finishes, dropped or not, and of every trained one when it is trained.

Invariant: the numbers are exact for what was told in the last `window` steps, in whatever order within a step. What is
trained was generated up to S + 1 steps before, so lengths that grow by a share g in a step show as a bias of up to
-(S + 1)·g.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 20
"""Steps over which lengths are compared."""


class LengthLog:
    """Lengths of generated and of trained completions over a sliding window of steps."""

    def __init__(self, window: int = WINDOW) -> None:
        assert window >= 1, f"a window of {window} steps"
        self._generated = _Window(window)
        self._trained = _Window(window)

    def generated(self, lengths_G: Sequence[int] | NDArray[np.int64]) -> None:
        """Note a group that finished, whatever becomes of it: the tokens of its completions."""
        self._generated.add(lengths_G)

    def trained(self, lengths_G: Sequence[int] | NDArray[np.int64]) -> None:
        """Note a group that was trained: the tokens of those of its completions that the loss read."""
        self._trained.add(lengths_G)

    def end_step(self) -> dict[str, float]:
        """End a step, and return the metrics of the window; what has nothing to be measured on is left out.

        `length/bias` is m_t / m_g - 1 with the means m of trained and generated lengths. `length/bias_error` is its
        standard error by the delta method, (m_t / m_g) · sqrt(e_t² / m_t² + e_g² / m_g²), with the standard errors e of
        the means; completions of one group have similar lengths, so e counts groups (see `_Window.mean_and_error`). The
        trained are among the generated, so the true error is smaller.
        """
        metrics: dict[str, float] = {}
        for name, window in (("generated", self._generated), ("trained", self._trained)):
            window.end_step()
            if window.number:
                p50, p95 = window.percentiles((0.50, 0.95))
                metrics[f"length/{name}_mean"] = window.mean_and_error()[0]
                metrics |= {f"length/{name}_p50": p50, f"length/{name}_p95": p95}
        (mean_g, error_g), (mean_t, error_t) = self._generated.mean_and_error(), self._trained.mean_and_error()
        if mean_g > 0 and mean_t > 0 and np.isfinite(error_g) and np.isfinite(error_t):
            ratio = mean_t / mean_g
            metrics["length/bias"] = ratio - 1
            metrics["length/bias_error"] = ratio * float(np.hypot(error_t / mean_t, error_g / mean_g))
        return metrics

    def state(self) -> dict[str, Any]:
        """The window as JSON-able data, for a checkpoint."""
        return {"generated": self._generated.state(), "trained": self._trained.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`; a shorter window keeps the newest steps."""
        self._generated.restore(state["generated"])
        self._trained.restore(state["trained"])


@dataclass(frozen=True)
class _Sums:
    """Over groups with n completions of L tokens together; whole numbers, so that they add up exactly."""

    groups: int = 0
    n: int = 0
    tokens: int = 0
    n_squared: int = 0
    n_tokens: int = 0
    tokens_squared: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.groups + other.groups,
            self.n + other.n,
            self.tokens + other.tokens,
            self.n_squared + other.n_squared,
            self.n_tokens + other.n_tokens,
            self.tokens_squared + other.tokens_squared,
        )


@dataclass(frozen=True)
class _Step:
    """The lengths of one step: a histogram of those that occur, and the sums over its groups."""

    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]
    sums: _Sums


class _Window:
    """Lengths of one kind. A step is kept as a histogram: its size is bounded by the token limit, not by its groups."""

    def __init__(self, size: int) -> None:
        self._steps: deque[_Step] = deque(maxlen=size)
        self._counts: dict[int, int] = {}
        self._sums = _Sums()
        self._total = _Sums()

    @property
    def number(self) -> int:
        """Completions in the window, up to the last `end_step`."""
        return self._total.n

    def add(self, lengths_G: Sequence[int] | NDArray[np.int64]) -> None:
        lengths = [int(length) for length in lengths_G]
        for length in lengths:
            self._counts[length] = self._counts.get(length, 0) + 1
        n, tokens = len(lengths), sum(lengths)
        self._sums += _Sums(int(n > 0), n, tokens, n * n, n * tokens, tokens * tokens)

    def end_step(self) -> None:
        keys, values = list(self._counts.keys()), list(self._counts.values())
        self._steps.append(_Step(np.array(keys, dtype=np.int64), np.array(values, dtype=np.int64), self._sums))
        self._counts, self._sums = {}, _Sums()
        self._add_up()

    def mean_and_error(self) -> tuple[float, float]:
        """Return the mean length m and its standard error, as that of a ratio of sums over k groups.

        sqrt(k / (k - 1) · Σ (L - n m)²) / Σ n; infinite for one group, and the mean is 0 where there is none. See
        *Sampling Techniques* (Cochran, 1977), chapter 6, "Ratio estimators".
        """
        total = self._total
        if total.n == 0:
            return 0.0, np.inf
        mean = total.tokens / total.n
        if total.groups == 1:
            return mean, np.inf
        squares = total.tokens_squared - 2 * mean * total.n_tokens + mean * mean * total.n_squared
        return mean, (total.groups / (total.groups - 1) * max(squares, 0.0)) ** 0.5 / total.n

    def percentiles(self, shares: Sequence[float]) -> list[float]:
        """Return, for each share, the smallest length that at least this share of the completions does not exceed."""
        lengths = np.concatenate([step.lengths for step in self._steps])
        counts = np.concatenate([step.counts for step in self._steps])
        cumulative = np.bincount(lengths, weights=counts).cumsum()  # float64, exact up to 2^53 completions
        return [float(np.searchsorted(cumulative, share * cumulative[-1])) for share in shares]

    def state(self) -> dict[str, Any]:
        steps = [*self._steps, _Step(np.array([*self._counts]), np.array([*self._counts.values()]), self._sums)]
        return {
            "steps": [
                {"lengths": step.lengths.tolist(), "counts": step.counts.tolist(), "sums": list(astuple(step.sums))}
                for step in steps
            ]
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        *ended, begun = state["steps"]
        self._steps.clear()
        self._steps.extend(
            _Step(
                np.array(step["lengths"], dtype=np.int64),
                np.array(step["counts"], dtype=np.int64),
                _Sums(*step["sums"]),
            )
            for step in ended
        )
        self._counts = dict(zip(begun["lengths"], begun["counts"], strict=True))
        self._sums = _Sums(*begun["sums"])
        self._add_up()

    def _add_up(self) -> None:
        self._total = sum((step.sums for step in self._steps), start=_Sums())
