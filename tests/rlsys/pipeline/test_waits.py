import asyncio

import pytest

from rlsys.errors import RoleError
from rlsys.metrics import METRICS
from rlsys.pipeline.waits import WAITS, Cause, Role, WaitClock, within
from tests.rlsys.virtual_time import run_virtual

WORKER, LEARNER = Role.ROLLOUT_WORKER, Role.LEARNER


class Clock:
    """Time that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_clock(workers: int = 2) -> tuple[Clock, WaitClock]:
    clock = Clock()
    return clock, WaitClock(clock, {WORKER: workers, LEARNER: 1, Role.REWARD_SCORER: 1})


def test_members_that_work_at_once_add_up() -> None:
    clock, waits = make_clock()
    with waits.busy(WORKER):
        clock.now += 2
        with waits.busy(WORKER):
            clock.now += 3
        clock.now += 1
    # 6 s of the first member and 3 s of the second, out of 2 x 6 s.
    assert waits.totals().busy_seconds[WORKER] == 9
    assert waits.fractions(WORKER)["busy"] == pytest.approx(9 / 12)


def test_each_wait_counts_for_its_cause_and_the_rest_is_idle() -> None:
    clock, waits = make_clock(workers=1)
    with waits.blocked(WORKER, Cause.STALENESS_GATE):
        clock.now += 3
    with waits.blocked(WORKER, Cause.WEIGHT_LOAD):
        clock.now += 1
    with waits.busy(WORKER):
        clock.now += 4
    clock.now += 2
    fractions = waits.fractions(WORKER)
    assert fractions["staleness_gate"] == pytest.approx(0.3)
    assert fractions["weight_load"] == pytest.approx(0.1)
    assert fractions["busy"] == pytest.approx(0.4)
    assert fractions["idle"] == pytest.approx(0.2)
    assert sum(fractions.values()) == pytest.approx(1.0)


def test_an_open_interval_counts_up_to_now() -> None:
    clock, waits = make_clock()
    with waits.blocked(LEARNER, Cause.GROUPS):
        clock.now += 5
        assert waits.totals().blocked_seconds[LEARNER, Cause.GROUPS] == 5


def test_a_wait_that_ends_with_an_error_is_closed() -> None:
    clock, waits = make_clock()

    def fail_after_a_second() -> None:
        clock.now += 1
        raise KeyError

    with pytest.raises(KeyError), waits.blocked(LEARNER, Cause.GROUPS):
        fail_after_a_second()
    with pytest.raises(KeyError), waits.busy(LEARNER):
        fail_after_a_second()
    clock.now += 10
    assert waits.totals().blocked_seconds[LEARNER, Cause.GROUPS] == 1
    assert waits.totals().busy_seconds[LEARNER] == 1


def test_a_lap_holds_only_its_own_step() -> None:
    clock, waits = make_clock()
    with waits.busy(LEARNER):
        clock.now += 4
        waits.lap()
        clock.now += 1
    clock.now += 1
    lap = waits.lap()
    assert lap.busy_seconds[LEARNER] == 1
    assert lap.member_seconds[LEARNER] == 2
    assert lap.fractions(LEARNER)["busy"] == pytest.approx(0.5)


def test_a_lost_worker_lowers_what_was_possible() -> None:
    clock, waits = make_clock(workers=2)
    clock.now += 3
    waits.set_members(WORKER, 1)
    clock.now += 4
    assert waits.totals().member_seconds[WORKER] == 2 * 3 + 4


def test_a_role_has_only_the_waits_that_are_listed_for_it() -> None:
    _, waits = make_clock()
    with pytest.raises(AssertionError, match="learner is not known to wait for staleness_gate"):
        waits.blocked(LEARNER, Cause.STALENESS_GATE).__enter__()


def test_a_clock_that_goes_back_is_refused() -> None:
    clock, waits = make_clock()
    clock.now -= 1
    with pytest.raises(AssertionError, match="went back"):
        waits.totals()


def bottleneck_of(seconds: dict[tuple[Role, Cause | None], float]) -> str:
    """One worker and one learner, each of whose states lasts the given part of 100 s; None is busy."""
    clock, waits = make_clock(workers=1)
    changes = sorted({0.0, 100.0})
    open_states = {}
    for role in (WORKER, LEARNER):
        start = 0.0
        for (of, cause), length in seconds.items():
            if of is role:
                open_states[of, cause] = (start, start + length)
                changes += [start, start + length]
                start += length
    contexts = {}
    for moment in sorted(set(changes)):
        clock.now = 1000.0 + moment
        for (role, cause), (begin, end) in open_states.items():
            if moment == end and (role, cause) in contexts:
                contexts.pop((role, cause)).__exit__(None, None, None)
            if moment == begin and end > begin:
                context = waits.busy(role) if cause is None else waits.blocked(role, cause)
                context.__enter__()
                contexts[role, cause] = context
    return waits.bottleneck()


def test_a_learner_that_waits_blames_the_rollout_workers() -> None:
    sentence = bottleneck_of({(LEARNER, Cause.GROUPS): 38, (LEARNER, None): 62, (WORKER, None): 95})
    assert sentence == "learner waits 38 % for groups; rollout workers are the bottleneck"


def test_workers_that_wait_at_the_gate_blame_the_learner() -> None:
    sentence = bottleneck_of({(WORKER, Cause.STALENESS_GATE): 52, (WORKER, None): 48, (LEARNER, Cause.GROUPS): 2})
    assert sentence == "rollout workers wait 52 % at the staleness gate; the learner is the bottleneck"


def test_sides_that_take_turns_blame_the_bound() -> None:
    sentence = bottleneck_of({
        (LEARNER, Cause.GROUPS): 60, (LEARNER, None): 40, (WORKER, None): 60, (WORKER, Cause.STALENESS_GATE): 40,
    })  # fmt: skip
    assert sentence == (
        "learner waits 60 % for groups and rollout workers 40 % at the staleness gate; "
        "the staleness bound is the bottleneck"
    )


def test_workers_that_wait_for_features_more_than_they_work_pass_the_blame_on() -> None:
    sentence = bottleneck_of({
        (LEARNER, Cause.GROUPS): 70,
        (WORKER, None): 30, (WORKER, Cause.REWARD_WAIT): 10, (WORKER, Cause.EMBED_WAIT): 60,
    })  # fmt: skip
    assert sentence == "learner waits 70 % for groups; the embedding service is the bottleneck"


def test_workers_whose_weights_wait_for_an_evaluation_blame_it() -> None:
    sentence = bottleneck_of({(WORKER, Cause.EVALUATION): 30, (WORKER, None): 70, (LEARNER, Cause.EVALUATION): 20})
    assert sentence == "rollout workers wait 30 % for an evaluation; the evaluation is the bottleneck"


@pytest.mark.parametrize("role", [WORKER, LEARNER])
def test_every_wait_has_a_sentence(role: Role) -> None:
    for cause in WAITS[role]:
        assert bottleneck_of({(role, cause): 50, (role, None): 50}).endswith(" the bottleneck")


def test_a_learner_that_never_waits_is_the_bottleneck_whatever_the_workers_wait_for() -> None:
    sentence = bottleneck_of({(WORKER, Cause.REWARD_WAIT): 50, (WORKER, None): 50, (LEARNER, None): 98})
    assert sentence == "rollout workers wait 50 % for scores; the learner is the bottleneck"


def test_short_waits_are_no_bottleneck() -> None:
    sentence = bottleneck_of({(LEARNER, Cause.GROUPS): 4, (WORKER, Cause.STALENESS_GATE): 4})
    assert sentence == "no role waits for more than 5 % of its time; the run is balanced"


def test_the_metrics_are_listed_and_leave_out_roles_without_members() -> None:
    clock, waits = make_clock()
    clock.now += 1
    values = waits.lap().metrics()
    assert values.keys() <= METRICS.keys()
    assert "time/learner_groups_fraction" in values
    assert not any(name.startswith("time/embedding_service") for name in values)


async def answer_after(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "answer"


def test_what_comes_before_its_deadline_is_returned() -> None:
    assert run_virtual(within(10, answer_after(9), role="learner", call="step")) == "answer"
    assert run_virtual(within(None, answer_after(9e4), role="learner", call="step")) == "answer"


def test_what_misses_its_deadline_is_named_and_cancelled() -> None:
    async def run() -> None:
        call = asyncio.ensure_future(answer_after(11))
        with pytest.raises(RoleError) as raised:
            await within(10, call, role="learner", call="step 7", state=lambda: "two ranks answered")
        assert str(raised.value) == "learner: step 7 did not end within 10 s, its deadline\ntwo ranks answered"
        assert call.cancelled()

    run_virtual(run())


def test_a_timeout_of_the_call_itself_is_not_taken_for_the_deadline() -> None:
    async def fail() -> None:
        raise TimeoutError("of the call")

    with pytest.raises(TimeoutError, match="of the call"):
        run_virtual(within(10, fail(), role="learner", call="step"))
