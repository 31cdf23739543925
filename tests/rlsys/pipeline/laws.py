"""The laws of the buffer, checked on a run in miniature by books that are kept apart from the buffer's own."""

from __future__ import annotations

from rlsys.pipeline.buffer import TrajectoryBuffer
from rlsys.pipeline.ledger import DropReason
from rlsys.pipeline.staleness import EvictStaleness, StalenessPolicy, StrictStaleness, WindowedStaleness
from tests.rlsys.pipeline.simulation import Books, Pace, Simulation
from tests.rlsys.virtual_time import run_virtual


def slots_of(policy: StalenessPolicy) -> int:
    """(S+1)·P, less one for each group that may pass."""
    window = policy.window if isinstance(policy, WindowedStaleness) else 0
    return (policy.bound + 1) * policy.groups_per_step - window


def most_passed(books: Books) -> int:
    """The greatest number of younger groups that were trained in earlier batches than any one group, by counting.

    A group that was neither trained nor dropped still waits, behind all batches.
    """
    batch_of = {ticket: number for number, batch in enumerate(books.batches) for ticket in batch}
    waits = len(books.batches)
    return max(
        sum(younger > ticket and batch < batch_of.get(ticket, waits) for younger, batch in batch_of.items())
        for ticket in set(books.problems) - set(books.dropped)
    )


def check_laws(buffer: TrajectoryBuffer, books: Books, policy: StalenessPolicy) -> None:
    """Raise AssertionError where the run broke a law of the buffer."""
    assert max(books.staleness) <= policy.bound, f"trained at staleness {max(books.staleness)}"
    assert [len(batch) for batch in books.batches] == [policy.groups_per_step] * books.version
    assert books.most_held <= slots_of(policy), f"{books.most_held} slots were taken at once"
    _check_order(books, policy)
    _check_ends(buffer, books, policy)
    _check_tokens(buffer, books)


def _check_order(books: Books, policy: StalenessPolicy) -> None:
    match policy:
        case WindowedStaleness():
            assert most_passed(books) <= policy.window, f"a group was passed by {most_passed(books)} others"
        case StrictStaleness():
            assert most_passed(books) == 0, f"a group was passed by {most_passed(books)} others"
        case _:
            pass


def _check_ends(buffer: TrajectoryBuffer, books: Books, policy: StalenessPolicy) -> None:
    """Every problem that was drawn is trained, dropped, stale or held: one of them, once."""
    trained, dropped = books.trained, books.dropped
    held = [ticket for ticket in books.problems if ticket in buffer]
    ended = [*trained, *dropped, *held]
    assert len(ended) == len(set(ended)), "a group ended twice"
    stale = set(books.evicted_at) if isinstance(policy, EvictStaleness) else set[int]()
    lost = set(range(books.drawn)) - set(ended)
    assert lost == stale, f"groups {sorted(lost ^ stale)} were lost, or ended twice"
    for ticket in stale:
        staleness = books.evicted_at[ticket] - books.first_versions[ticket]
        assert staleness > policy.bound, f"group {ticket} was thrown away at staleness {staleness}"
    assert books.problems == {ticket: str(ticket) for ticket in range(books.drawn)}
    buffer.ledger.check()
    counts = buffer.ledger.counts()
    assert (counts.groups_admitted, counts.groups_trained) == (books.drawn, len(trained))
    assert counts.groups_dropped[DropReason.STALE] == len(stale)
    assert sum(counts.groups_dropped.values()) == len(dropped) + len(stale)
    # All weights are live at the end of a run, so only what can still be trained holds a slot.
    assert buffer.num_held == counts.groups_in_flight == len(held), "a slot was lost, or freed twice"


def _check_tokens(buffer: TrajectoryBuffer, books: Books) -> None:
    counts = buffer.ledger.counts()
    assert counts.tokens_generated == sum(books.tokens.values())
    assert counts.tokens_trained == sum(books.tokens[ticket] - 1 for ticket in books.trained)
    assert counts.tokens_masked == len(books.trained)


def run_checked(
    buffer_type: type[TrajectoryBuffer], policy: StalenessPolicy, pace: Pace, seed: int, steps: int
) -> Books:
    """Run a simulation under virtual time and check the laws for the bound and the batch size of `policy`."""

    async def run() -> Books:
        buffer = buffer_type(policy)
        books = await Simulation(buffer, policy, pace, seed).run(steps)
        check_laws(buffer, books, policy)
        return books

    return run_virtual(run())
