"""The account of all groups and tokens: what was admitted, what became of it, and what is still under way.

The trajectory buffer writes it as groups pass; the controller reads it once per step and a checkpoint keeps it.

Invariant, for groups: admitted = trained + dropped (by reason) + in flight, and no group ends twice. For tokens:
generated = trained + masked + discarded (by reason) + in flight. The token books are double entry: `generate` counts
what a group wrote when it finished, `train` counts what the learner's loss read, so `check` finds a token that one side
knows and the other does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class DropReason(StrEnum):
    """Why an admitted group ends without being trained."""

    FILTERED = "filtered"
    """It has nothing to teach: all its rewards are equal."""
    FAILED = "failed"
    """Fewer than two of its trajectories can be used: not scored, or with log-probabilities that are not finite."""
    CANCELLED = "cancelled"
    """Whoever rolled it out gave it up."""
    STALE = "stale"
    """It was finished too late for the staleness bound; only under a policy that evicts."""


@dataclass(frozen=True)
class LedgerCounts:
    """Totals since the run began (a resumed run goes on counting)."""

    groups_admitted: int
    groups_in_flight: int
    groups_trained: int
    groups_dropped: Mapping[DropReason, int]
    tokens_generated: int
    tokens_in_flight: int
    """Tokens of finished groups that are not yet trained."""
    tokens_trained: int
    """Tokens that counted in the learner's loss."""
    tokens_masked: int
    """Tokens of trained groups that did not count: invalid scores, truncated completions where these are masked."""
    tokens_discarded: Mapping[DropReason, int]


class Ledger:
    """Counts groups and tokens from admission to exactly one end."""

    def __init__(self) -> None:
        self._groups_admitted = 0
        self._groups_trained = 0
        self._groups_dropped = dict.fromkeys(DropReason, 0)
        self._tokens_generated = 0
        self._tokens_trained = 0
        self._tokens_masked = 0
        self._tokens_discarded = dict.fromkeys(DropReason, 0)
        self._open_tokens: dict[int, int] = {}

    def admit(self, ticket: int) -> None:
        """Open the account of a group."""
        assert ticket not in self._open_tokens, f"group {ticket} is admitted twice"
        self._groups_admitted += 1
        self._open_tokens[ticket] = 0

    def generate(self, ticket: int, tokens: int) -> None:
        """Count `tokens` that the policy wrote for an open group."""
        self._assert_open(ticket)
        assert tokens >= 0, f"group {ticket}: {tokens} generated tokens"
        self._tokens_generated += tokens
        self._open_tokens[ticket] += tokens

    def train(self, ticket: int, *, trained_tokens: int, masked_tokens: int) -> None:
        """End a group: the learner made an optimizer step on it. The two numbers come from what the learner read."""
        self._assert_open(ticket)
        assert min(trained_tokens, masked_tokens) >= 0, (
            f"group {ticket}: {trained_tokens} trained and {masked_tokens} masked tokens"
        )
        del self._open_tokens[ticket]
        self._groups_trained += 1
        self._tokens_trained += trained_tokens
        self._tokens_masked += masked_tokens

    def drop(self, ticket: int, reason: DropReason) -> None:
        """End a group that is not trained; its tokens are discarded for `reason`."""
        self._assert_open(ticket)
        self._tokens_discarded[reason] += self._open_tokens.pop(ticket)
        self._groups_dropped[reason] += 1

    def counts(self) -> LedgerCounts:
        """Return the totals."""
        return LedgerCounts(
            groups_admitted=self._groups_admitted,
            groups_in_flight=len(self._open_tokens),
            groups_trained=self._groups_trained,
            groups_dropped=dict(self._groups_dropped),
            tokens_generated=self._tokens_generated,
            tokens_in_flight=sum(self._open_tokens.values()),
            tokens_trained=self._tokens_trained,
            tokens_masked=self._tokens_masked,
            tokens_discarded=dict(self._tokens_discarded),
        )

    def check(self) -> None:
        """Raise AssertionError, with the numbers, when groups or tokens do not reconcile."""
        counts = self.counts()
        dropped = sum(counts.groups_dropped.values())
        assert counts.groups_admitted == counts.groups_trained + dropped + counts.groups_in_flight, (
            f"groups do not reconcile: admitted {counts.groups_admitted} != trained {counts.groups_trained} "
            f"+ dropped {dropped} + in flight {counts.groups_in_flight}"
        )
        discarded = sum(counts.tokens_discarded.values())
        accounted = counts.tokens_trained + counts.tokens_masked + discarded + counts.tokens_in_flight
        assert counts.tokens_generated == accounted, (
            f"tokens do not reconcile: generated {counts.tokens_generated} != trained {counts.tokens_trained} "
            f"+ masked {counts.tokens_masked} + discarded {discarded} + in flight {counts.tokens_in_flight}"
        )

    def metrics(self) -> dict[str, float]:
        """Return the totals under their names in `rlsys.metrics`."""
        counts = self.counts()
        values: dict[str, float] = {
            "group/admitted": counts.groups_admitted,
            "group/in_flight": counts.groups_in_flight,
            "group/trained": counts.groups_trained,
            "tokens/generated": counts.tokens_generated,
            "tokens/in_flight": counts.tokens_in_flight,
            "tokens/trained": counts.tokens_trained,
            "tokens/masked": counts.tokens_masked,
        }
        values |= {f"group/{reason}": number for reason, number in counts.groups_dropped.items()}
        values |= {f"tokens/{reason}": number for reason, number in counts.tokens_discarded.items()}
        return values

    def snapshot(self) -> dict[str, Any]:
        """Return everything as JSON-able data, for a checkpoint."""
        return {
            "groups_admitted": self._groups_admitted,
            "groups_trained": self._groups_trained,
            "groups_dropped": {str(reason): number for reason, number in self._groups_dropped.items()},
            "tokens_generated": self._tokens_generated,
            "tokens_trained": self._tokens_trained,
            "tokens_masked": self._tokens_masked,
            "tokens_discarded": {str(reason): number for reason, number in self._tokens_discarded.items()},
            "open_tokens": {str(ticket): tokens for ticket, tokens in self._open_tokens.items()},
        }

    @classmethod
    def restore(cls, snapshot: Mapping[str, Any]) -> Ledger:
        """Return the ledger that `snapshot` was taken from."""
        ledger = cls()
        ledger._groups_admitted = snapshot["groups_admitted"]
        ledger._groups_trained = snapshot["groups_trained"]
        ledger._groups_dropped |= {DropReason(name): number for name, number in snapshot["groups_dropped"].items()}
        ledger._tokens_generated = snapshot["tokens_generated"]
        ledger._tokens_trained = snapshot["tokens_trained"]
        ledger._tokens_masked = snapshot["tokens_masked"]
        ledger._tokens_discarded |= {DropReason(name): number for name, number in snapshot["tokens_discarded"].items()}
        ledger._open_tokens = {int(ticket): tokens for ticket, tokens in snapshot["open_tokens"].items()}
        return ledger

    def _assert_open(self, ticket: int) -> None:
        assert ticket in self._open_tokens, f"group {ticket} is not open: it was never admitted, or it has ended"
