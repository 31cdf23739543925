"""A session's totals, ledger and evaluations -> the run's summary."""

from __future__ import annotations

from actors.session import Session
from rlsys.pipeline.ledger import Ledger
from rlsys.report.summary import RunStatus, StalenessSummary, Summary, ThroughputSummary, TimeSummary, TokenSummary


def summarise(session: Session, status: RunStatus) -> Summary:
    """What the run did so far; phases that did not begin are zeros."""
    totals = session.totals
    ledger = session.buffer.ledger if session.buffer is not None else Ledger()
    counts = ledger.counts()
    seconds = max(totals.grpo_seconds, 1e-9)
    discarded = {str(reason): tokens for reason, tokens in counts.tokens_discarded.items()}
    return Summary(
        name=session.config.name,
        status=status,
        seed=session.config.seed,
        steps=totals.steps,
        wall_seconds=session.wall_seconds,
        evaluation=session.evaluations,
        tokens=TokenSummary(
            counts.tokens_generated,
            counts.tokens_trained,
            counts.tokens_in_flight,
            {**discarded, "masked": counts.tokens_masked},
        ),
        staleness=StalenessSummary(
            mean=totals.staleness_sum / max(1, totals.steps),
            max=int(totals.staleness_max),
            bound=session.config.grpo.max_staleness,
        ),
        time=TimeSummary(
            learner_idle_fraction=_idle(totals.learner_busy_seconds, totals.learner_seconds),
            rollout_idle_fraction=_idle(totals.rollout_busy_seconds, totals.rollout_seconds),
            weight_load_seconds_mean=totals.load_seconds / max(1, totals.loads),
            bottleneck=session.bottleneck,
        ),
        throughput=ThroughputSummary(
            trajectories_per_second=totals.trained_trajectories / seconds,
            trained_tokens_per_second=counts.tokens_trained / seconds,
            generated_tokens_per_second=counts.tokens_generated / seconds,
        ),
        mismatch=totals.mismatch_sum / totals.mismatch_steps if totals.mismatch_steps else None,
        alarms=session.alarms,
    )


def _idle(busy_seconds: float, seconds: float) -> float:
    return 1.0 - busy_seconds / seconds if seconds else 0.0
