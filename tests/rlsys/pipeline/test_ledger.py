import json

import pytest

from rlsys.metrics import METRICS
from rlsys.pipeline.ledger import DropReason, Ledger


def ledger_with_all_ends() -> Ledger:
    """Tickets 0..5: trained (10 tokens, 3 masked), filtered (20), failed (5), finished (7), in flight, stale (8)."""
    ledger = Ledger()
    for ticket in range(6):
        ledger.admit(ticket)
    for ticket, tokens in [(0, 10), (1, 20), (2, 5), (3, 7), (5, 8)]:
        ledger.generate(ticket, tokens)
    ledger.train(0, trained_tokens=7, masked_tokens=3)
    ledger.drop(1, DropReason.FILTERED)
    ledger.drop(2, DropReason.FAILED)
    ledger.drop(5, DropReason.STALE)
    return ledger


def ends(**numbers: int) -> dict[DropReason, int]:
    return {DropReason(name): number for name, number in numbers.items()}


def test_groups_and_tokens_reconcile() -> None:
    ledger = ledger_with_all_ends()
    ledger.check()
    counts = ledger.counts()
    assert (counts.groups_admitted, counts.groups_trained, counts.groups_in_flight) == (6, 1, 2)
    assert counts.groups_dropped == ends(filtered=1, failed=1, cancelled=0, stale=1)
    assert (counts.tokens_generated, counts.tokens_trained, counts.tokens_masked) == (50, 7, 3)
    assert counts.tokens_in_flight == 7
    assert counts.tokens_discarded == ends(filtered=20, failed=5, cancelled=0, stale=8)


def test_tokens_that_the_learner_never_read_are_found() -> None:
    ledger = Ledger()
    ledger.admit(0)
    ledger.generate(0, 10)
    ledger.train(0, trained_tokens=8, masked_tokens=1)
    with pytest.raises(AssertionError, match=r"generated 10 != trained 8 [+] masked 1 [+] discarded 0 [+] in flight 0"):
        ledger.check()


@pytest.mark.parametrize("ticket", [0, 1, 9])
def test_a_group_ends_once_and_only_when_it_was_admitted(ticket: int) -> None:
    ledger = ledger_with_all_ends()
    with pytest.raises(AssertionError, match=f"group {ticket} is not open"):
        ledger.drop(ticket, DropReason.CANCELLED)
    with pytest.raises(AssertionError, match=f"group {ticket} is not open"):
        ledger.train(ticket, trained_tokens=0, masked_tokens=0)
    with pytest.raises(AssertionError, match=f"group {ticket} is not open"):
        ledger.generate(ticket, 1)


def test_a_group_is_admitted_once() -> None:
    with pytest.raises(AssertionError, match="group 4 is admitted twice"):
        ledger_with_all_ends().admit(4)


def test_more_tokens_in_the_loss_than_were_generated_are_refused() -> None:
    with pytest.raises(AssertionError, match="8 trained and -1 masked"):
        ledger_with_all_ends().train(3, trained_tokens=8, masked_tokens=-1)


def test_a_snapshot_survives_json_and_goes_on_counting() -> None:
    ledger = Ledger.restore(json.loads(json.dumps(ledger_with_all_ends().snapshot())))
    assert ledger.counts() == ledger_with_all_ends().counts()
    ledger.generate(4, 6)
    ledger.drop(4, DropReason.CANCELLED)
    ledger.train(3, trained_tokens=7, masked_tokens=0)
    ledger.check()
    assert ledger.counts().tokens_generated == 56


def test_a_snapshot_from_before_a_reason_was_known_counts_none_of_it() -> None:
    snapshot = Ledger().snapshot()
    del snapshot["groups_dropped"]["stale"], snapshot["tokens_discarded"]["stale"]
    ledger = Ledger.restore(snapshot)
    ledger.admit(0)
    ledger.drop(0, DropReason.STALE)
    assert ledger.counts().groups_dropped == ends(filtered=0, failed=0, cancelled=0, stale=1)


def test_the_metrics_are_listed() -> None:
    values = ledger_with_all_ends().metrics()
    assert values.keys() <= METRICS.keys()
    assert (values["tokens/filtered"], values["group/failed"], values["group/in_flight"]) == (20, 1, 2)
