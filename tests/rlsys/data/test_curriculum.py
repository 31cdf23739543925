"""The curriculum: groups that teach more often, nothing forgotten, the same draws for the same records."""

from __future__ import annotations

import json
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config_grpo import CurriculumConfig
from rlsys.data.curriculum import Curriculum, WeightTree
from rlsys.data.cursor import ProblemCursor, ProblemSource
from rlsys.errors import CheckpointError
from tests.rlsys.groups import make_problem

IN_FLIGHT = 64


def curriculum(number: int, *, floor: float = 0.1, memory: float = 0.5, seed: int = 0) -> Curriculum:
    return Curriculum(
        [make_problem(name) for name in range(number)], CurriculumConfig(floor=floor, memory=memory), seed
    )


def draws_with(source: Curriculum, pass_rates: dict[str, float], number: int) -> list[str]:
    """Draw and measure one problem after the other."""
    drawn: list[str] = []
    for _ in range(number):
        drawn.append(source.next().problem_id)
        source.record(drawn[-1], pass_rates[drawn[-1]])
    return drawn


def zero_variance_share(source: ProblemSource, solve_rates: dict[str, float], trained: int) -> float:
    """The share of groups of 8 with equal rewards in a run that ends after `trained` others, 64 groups in flight."""
    random = np.random.default_rng(5)
    in_flight: deque[str] = deque()
    constant = taught = 0
    while taught < trained:
        in_flight.append(source.next().problem_id)
        if len(in_flight) == IN_FLIGHT:
            name = in_flight.popleft()
            solved = int(random.binomial(8, solve_rates[name]))
            source.record(name, solved / 8)
            constant += solved in (0, 8)
            taught += solved not in (0, 8)
    return constant / (constant + taught)


@pytest.mark.parametrize("number", [20_000, 700])
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (0.1, 0.3), (0.3, 0.1)], ids=["bimodal", "hard", "easy"])
def test_fewer_groups_teach_nothing_than_in_a_plain_walk(number: int, a: float, b: float) -> None:
    rates = np.random.default_rng(1).beta(a, b, number)
    solve_rates = {str(name): float(rate) for name, rate in enumerate(rates)}
    problems = [make_problem(name) for name in range(number)]
    walk = zero_variance_share(ProblemCursor(problems, 0, "grpo"), solve_rates, trained=40 * 32)
    drawn = zero_variance_share(curriculum(number), solve_rates, trained=40 * 32)
    assert drawn < 0.78 * walk


def test_thousands_of_unmeasured_problems_do_not_keep_the_good_ones_from_being_visited_again() -> None:
    # All problems are solved half of the time, so new ones and measured ones are worth the same. The unmeasured weigh
    # as much as the measured together, but at least 256: after 256 draws half of all draws are revisits, and of draws
    # 0 to 255 the k-th is one with probability k / (k + 256).
    source = curriculum(20_000)
    drawn = draws_with(source, {str(name): 0.5 for name in range(20_000)}, 1280)
    revisits = 1280 - len(set(drawn))
    measured, expected = 0.0, 0.0
    for _ in range(1280):
        chance = measured / (measured + max(256.0, measured))
        measured, expected = measured + 1 - chance, expected + chance
    assert abs(revisits - expected) < 4 * np.sqrt(1280 / 4)
    assert max(Counter(drawn).values()) <= 12


def test_unmeasured_problems_get_fewer_draws_where_the_first_visits_were_in_vain() -> None:
    # Every tenth problem is solved half of the time, the others never: a first visit is worth 0.1 * 1 + 0.9 * 0.1 =
    # 0.19, so about 0.19 / 1.19 = 16 % of the draws are first visits once the measured ones weigh more than 256.
    rates = {str(name): 0.5 * (name % 10 == 0) for name in range(20_000)}
    source = curriculum(20_000)
    before = set(draws_with(source, rates, 4_000))
    after = draws_with(source, rates, 2_000)
    assert 0.12 < len(set(after) - before) / 2_000 < 0.20


def test_what_is_always_or_never_solved_is_drawn_less_and_never_forgotten() -> None:
    # 40 problems of weight 1 and 40 of weight 0.1, one in flight: 0.1 / 44 of the draws, where the bound is
    # floor / 2N = 0.1 / 160, and 1 / 44 for the others.
    rates = {str(name): (0.5 if name < 40 else float(name % 2)) for name in range(80)}
    source = curriculum(80)
    draws_with(source, rates, 1_000)
    visits = Counter(draws_with(source, rates, 44_000))
    rare = [visits[str(name)] for name in range(40, 80)]
    assert min(rare) >= 44_000 * 0.1 / 160
    assert abs(np.mean(rare) - 100) < 10
    assert abs(np.mean([visits[str(name)] for name in range(40)]) - 1_000) < 30


@pytest.mark.parametrize("first", [0.5, 0.0])
def test_each_unmeasured_problem_is_visited_at_the_rate_that_is_promised(first: float) -> None:
    # Whatever the first visits give, each of N problems is drawn with probability >= floor / 2N at a draw, so the
    # chance that one is not drawn in k draws is <= (1 - floor / 2N)^k: in 2N / floor draws a share of 1/e at most.
    number, floor = 1_000, 0.1
    source = curriculum(number, floor=floor)
    good = {str(name): (0.5 if name < 400 else first) for name in range(number)}
    drawn = set(draws_with(source, good, int(2 * number / floor)))
    assert len(drawn) >= (1 - np.exp(-1)) * number


def test_a_problem_that_is_under_way_is_not_drawn_again() -> None:
    source = curriculum(200)
    under_way: deque[str] = deque()
    for _ in range(1_000):
        name = source.next().problem_id
        assert name not in under_way
        under_way.append(name)
        if len(under_way) == 100:
            source.record(under_way.popleft(), 0.5)


def test_where_all_problems_are_under_way_the_oldest_is_drawn_again() -> None:
    source = curriculum(3)
    first = [source.next().problem_id for _ in range(3)]
    assert [source.next().problem_id for _ in range(6)] == first * 2


def test_a_problem_whose_group_never_reports_comes_back() -> None:
    # Of 10 problems one is lost and the others report at once. It comes back 10 draws after its own, and then weighs as
    # much as each of the others: drawn within the next 90 but for a chance of 0.9^90 = 8e-5.
    source = curriculum(10)
    lost = source.next().problem_id
    rates = {str(name): 0.5 for name in range(10)}
    assert lost not in draws_with(source, rates, 10)
    assert lost in draws_with(source, rates, 90)


def test_the_pass_rate_remembers_as_configured() -> None:
    source = curriculum(5, memory=0.75)
    source.record("2", 1.0)
    assert source.state()["pass_rates"] == {"2": 1.0}
    source.record("2", 0.2)  # 0.75 * 1 + 0.25 * 0.2
    assert source.state()["pass_rates"] == {"2": pytest.approx(0.8)}


@pytest.mark.parametrize("pass_rate", [-0.1, 1.1, float("nan")])
def test_a_pass_rate_is_a_share(pass_rate: float) -> None:
    with pytest.raises(AssertionError, match=r"problem 2: pass rate .* is not in \[0, 1\]"):
        curriculum(5).record("2", pass_rate)


RUNS = st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 8), st.floats(0, 1))), max_size=60)
"""What happens: None draws a problem, (k, p) measures the k-th oldest that is under way."""


def play(source: Curriculum, run: list[tuple[int, float] | None], under_way: list[str]) -> list[str]:
    drawn: list[str] = []
    for event in run:
        if event is None:
            drawn.append(source.next().problem_id)
            under_way.append(drawn[-1])
        elif under_way:
            source.record(under_way.pop(event[0] % len(under_way)), event[1])
    return drawn


@given(RUNS, RUNS, st.integers(1, 12), st.integers(0, 3))
def test_a_restored_curriculum_goes_on_as_the_one_that_was_saved(
    before: list[tuple[int, float] | None], after: list[tuple[int, float] | None], number: int, seed: int
) -> None:
    whole, restored = curriculum(number, seed=seed), curriculum(number, seed=seed)
    under_way: list[str] = []
    play(whole, before, under_way)
    restored.restore(json.loads(json.dumps(whole.state(), sort_keys=True)))
    after = [*after, *[None] * 2 * number]
    assert play(restored, after, list(under_way)) == play(whole, after, list(under_way))
    assert restored.state() == whole.state()


def test_a_problem_that_came_back_unmeasured_is_still_there_after_a_restore() -> None:
    whole, restored = curriculum(10, seed=1), curriculum(10, seed=1)
    lost = whole.next().problem_id
    rates = {str(name): 0.5 for name in range(10)}
    draws_with(whole, {name: rate for name, rate in rates.items() if name != lost}, 10)
    whole.record(whole.next().problem_id, 0.5)  # the lost one is back from here on, and was not drawn
    assert lost in whole.state()["returned"]
    restored.restore(json.loads(json.dumps(whole.state())))
    assert draws_with(restored, rates, 50) == draws_with(whole, rates, 50)


def test_the_same_seed_and_records_give_the_same_draws_and_another_seed_others() -> None:
    rates = {str(name): name / 50 for name in range(50)}
    assert draws_with(curriculum(50), rates, 100) == draws_with(curriculum(50), rates, 100)
    assert draws_with(curriculum(50), rates, 100) != draws_with(curriculum(50, seed=1), rates, 100)


def test_a_state_of_another_source_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"source curriculum, problems 4, ids [0-9a-f]{8}, seed 0"):
        curriculum(5).restore(curriculum(4).state())
    with pytest.raises(CheckpointError, match=r"source grpo walk, problems 5, ids [0-9a-f]{8}, seed 0"):
        curriculum(5).restore(ProblemCursor([make_problem(name) for name in range(5)], 0, "grpo").state())


def test_a_state_of_as_many_other_problems_is_refused() -> None:
    drawn = curriculum(5)
    for _ in range(3):
        drawn.next()
    others = Curriculum([make_problem(name) for name in range(10, 15)], CurriculumConfig(), seed=0)
    with pytest.raises(CheckpointError, match="Resume with the data"):
        others.restore(drawn.state())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_the_tree_finds_what_a_row_of_weights_holds(weights: list[int], data: st.DataObject) -> None:
    tree = WeightTree(len(weights))
    for index, weight in enumerate(weights):
        tree.set(index, 9)
        tree.set(index, weight)
    changed = data.draw(st.integers(0, len(weights) - 1))
    weights[changed] = 3
    tree.set(changed, 3)
    row = [index for index, weight in enumerate(weights) for _ in range(weight)]
    assert tree.total == len(row)
    assert [tree.find(place) for place in range(tree.total)] == row
