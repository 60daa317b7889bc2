"""The dynamic programs against trying every path, on small runs."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.errors import PlanError
from blockcache.plan.paths import (
    allowed,
    bubbled,
    cheapest,
    cheapest_forecast,
    flattest,
    one_parent,
    segments,
)


@st.composite
def problems(draw, dimensions=2):
    """A table of segment costs and a number of steps; half of the tables are full of ties."""
    total = draw(st.integers(1, 8))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (total,) * (dimensions - 1) + (total + 1,)
    costs = random.random(shape)
    if draw(st.booleans()):
        costs = np.round(costs * 3)
    return costs, draw(st.integers(1, total))


def every_path(total, count):
    return [(0, *rest) for rest in combinations(range(1, total), count - 1)]


def parts(path, total):
    """The segments of a path."""
    return list(zip(path, (*path[1:], total), strict=True))


def costs_of(path, costs):
    return [costs[i, j] for i, j in parts(path, len(costs))]


def forecast_cost(path, costs):
    befores = (0, *path[:-1])
    whole = zip(befores, parts(path, len(costs)), strict=True)
    return sum(costs[i, j, k] for i, (j, k) in whole)


def is_path(path, total, count):
    return path in every_path(total, count)


@given(problems())
def test_cheapest_is_the_best_of_all_paths(problem):
    costs, count = problem
    path = cheapest(costs, count)
    assert is_path(path, len(costs), count)
    least = min(sum(costs_of(p, costs)) for p in every_path(len(costs), count))
    assert sum(costs_of(path, costs)) == pytest.approx(least, abs=1e-12)


@given(problems(), st.sampled_from([1.0, 2.0, 5.0]))
def test_cheapest_of_powers(problem, gamma):
    """MeanCache's objective."""
    costs, count = problem
    path = cheapest(costs**gamma, count)
    least = min(sum(c**gamma for c in costs_of(p, costs)) for p in every_path(len(costs), count))
    assert sum(c**gamma for c in costs_of(path, costs)) == pytest.approx(least, abs=1e-12)


@given(problems())
def test_most_similarity_in_sum(problem):
    """BAC's objective: reuse at step k of what step i computed is worth table[i, k]."""
    costs, count = problem
    table, total = costs[:, :-1], len(costs)

    def worth(path):
        return sum(table[i, k] for i, j in parts(path, total) for k in range(i + 1, j))

    path = cheapest(-segments(table), count)
    assert worth(path) == pytest.approx(max(map(worth, every_path(total, count))), abs=1e-12)


@given(problems())
def test_flattest_is_the_lexicographic_minimax(problem):
    costs, count = problem
    path = flattest(costs, count)
    assert is_path(path, len(costs), count)
    least = min(sorted(costs_of(p, costs), reverse=True) for p in every_path(len(costs), count))
    assert sorted(costs_of(path, costs), reverse=True) == least


@given(problems(dimensions=3))
def test_cheapest_forecast_is_the_best_of_all_paths(problem):
    costs, count = problem
    path = cheapest_forecast(costs, count)
    assert is_path(path, len(costs), count)
    least = min(forecast_cost(p, costs) for p in every_path(len(costs), count))
    assert forecast_cost(path, costs) == pytest.approx(least, abs=1e-12)


@given(problems())
def test_forecast_without_memory_is_the_ordinary_problem(problem):
    costs, count = problem
    alike = np.broadcast_to(costs, (len(costs), *costs.shape))
    # Of paths that cost the same each may take another one.
    least = sum(costs_of(cheapest(costs, count), costs))
    for path in (cheapest_forecast(alike, count), one_parent(alike, count)):
        assert sum(costs_of(path, costs)) == pytest.approx(least, abs=1e-12)


@given(problems(dimensions=3))
def test_one_parent_is_its_recurrence(problem):
    """Written down as in the paper, memoised by (m, j): the value, and the parent that gave it."""
    costs, count = problem
    total = len(costs)
    table = {(1, 0): (0.0, 0)}
    for m in range(2, count + 1):
        for k in range(1, total):
            options = [
                (table[m - 1, j][0] + costs[table[m - 1, j][1], j, k], j)
                for j in range(k)
                if (m - 1, j) in table
            ]
            if options:
                table[m, k] = min(options)
    last = {j: v + costs[parent, j, total] for (m, j), (v, parent) in table.items() if m == count}
    end = min(last, key=last.__getitem__)
    path = [end]
    for m in range(count, 1, -1):
        path.append(table[m, path[-1]][1])
    assert one_parent(costs, count) == tuple(reversed(path))


def test_one_parent_can_miss_the_best_path():
    """Step 3 is reached more cheaply by way of 1, which makes the segment after it dear."""
    costs = np.zeros((4, 4, 5))
    costs[0, 1, 2], costs[0, 2, 3], costs[1, 3, 4] = 5.0, 1.0, 10.0
    assert (cheapest_forecast(costs, 3), one_parent(costs, 3)) == ((0, 2, 3), (0, 1, 2))
    assert forecast_cost((0, 2, 3), costs) == 1.0 < forecast_cost((0, 1, 2), costs)


@given(problems(), st.data())
def test_forced_steps_and_longest_jump(problem, data):
    costs, count = problem
    total = len(costs)
    forced = data.draw(st.sets(st.integers(-total, total - 1), max_size=3))
    longest = data.draw(st.none() | st.integers(1, total))

    def keeps(path):
        jumps = all(j - i <= (longest or total) for i, j in parts(path, total))
        return jumps and {step % total for step in forced} <= set(path)

    table = allowed(costs, forced, longest)
    kept = [path for path in every_path(total, count) if keeps(path)]
    for solve in (cheapest, flattest):
        if kept:
            assert keeps(solve(table, count))
        else:
            with pytest.raises(PlanError, match="no path"):
                solve(table, count)
    if kept:
        least = min(sum(costs_of(path, costs)) for path in kept)
        assert sum(costs_of(cheapest(table, count), costs)) == pytest.approx(least, abs=1e-12)
    with_memory = allowed(np.broadcast_to(costs, (total, *costs.shape)), forced, longest)
    if kept:
        assert keeps(cheapest_forecast(with_memory, count))
    else:
        with pytest.raises(PlanError, match="no path"):
            cheapest_forecast(with_memory, count)


def test_segments_by_hand():
    table = np.arange(9.0).reshape(3, 3)
    # From step 0: nothing reused, step 1 reused (1), steps 1 and 2 (1 + 2); from 1: step 2 (5).
    assert segments(table)[0].tolist() == [0, 0, 1, 3]
    assert segments(table)[1, 2:].tolist() == [0, 5]
    assert segments(table)[2, 3] == 0


def test_impossible_tables():
    with pytest.raises(PlanError, match="cannot compute 4 steps of a run of 3"):
        cheapest(np.zeros((3, 4)), 4)
    with pytest.raises(PlanError, match=r"\[T, T \+ 1\], got \[3, 3\]"):
        flattest(np.zeros((3, 3)), 1)
    with pytest.raises(PlanError, match="not a number"):
        cheapest_forecast(np.full((3, 3, 4), np.nan), 2)
    with pytest.raises(PlanError, match="max_jump must be at least 1"):
        allowed(np.zeros((3, 4)), max_jump=0)
    with pytest.raises(PlanError, match="forced steps must lie in a run of 3"):
        allowed(np.zeros((3, 4)), forced=(3,))


def test_entries_that_lead_backward_do_not_matter():
    costs = np.full((4, 5), np.nan)
    costs[np.triu_indices(4, 1, 5)] = 1.0
    assert len(cheapest(costs, 3)) == len(flattest(costs, 3)) == 3


ROWS = st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=6)


@given(ROWS, st.data())
def test_bubbling(rows, data):
    units = st.sets(st.integers(0, len(rows) - 1))
    upstream, sources = data.draw(units), data.draw(units)
    made = bubbled(rows, upstream, sources)
    for unit, (before, after) in enumerate(zip(rows, made, strict=True)):
        assert list(after) == sorted(set(after))
        asked = [rows[s] for s in sources if s > unit] if unit in upstream else []
        assert set(after) == set(before).union(*asked)
    assert bubbled(made, upstream, sources) == made
