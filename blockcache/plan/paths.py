"""Exact dynamic programs over the steps that are computed.

A *path* is the increasing steps that are computed; it begins at step 0. Between two of them, and
from the last one to the end of the run T, lies a *segment* `(i, j)`: computed at i, reused at i + 1
.. j - 1. What a segment costs does not depend on the others, so the best of all binom(T - 1, n - 1)
paths of n steps is found in n T^2 operations. Offline methods differ in what a segment costs and
how costs add up:

* BAC (2506.13456) has the most similarity in sum: `cheapest(-segments(similarity), n)`;
* MeanCache (2601.19961) the least sum of powers: `cheapest(costs**gamma, n)`, gamma 5 in the paper;
* LeMiCa (2511.00090) the lexicographic minimax: `flattest(costs, n)`;
* DPCache (2602.22654) charges a segment by the computed step before it, too: `cheapest_forecast`.

Cost tables are `[T, T + 1]`, entry (i, j) for segment (i, j), infinite where a segment is not
allowed; entries with j <= i are never looked at.
"""

from bisect import insort
from collections.abc import Collection, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from blockcache.errors import PlanError

Floats: TypeAlias = NDArray[np.float64]
Path: TypeAlias = tuple[int, ...]


def segments(table: Floats) -> Floats:
    """Segment costs, when reusing at step k what step i computed costs `table[i, k]`.

    table: `[T, T]`. Returns `[T, T + 1]`.
    """
    total = len(table)
    made = np.zeros((total, total + 1))
    made[:, 1:] = np.cumsum(np.triu(table, 1), axis=1)
    return made


def allowed(costs: Floats, forced: Collection[int] = (), max_jump: int | None = None) -> Floats:
    """`costs` with infinity where a segment passes over a forced step or is longer than `max_jump`.

    costs: `[..., T, T + 1]`. forced: steps of every path; negative ones count from the end.
    max_jump: most steps from one computed step to the next, and to the end of the run.

    Raises:
        PlanError: a forced step outside the run, or a jump below 1.
    """
    total = costs.shape[-2]
    if max_jump is not None and max_jump < 1:
        raise PlanError(f"max_jump must be at least 1, got {max_jump}")
    if any(not -total <= step < total for step in forced):
        raise PlanError(f"forced steps must lie in a run of {total}, got {sorted(forced)}")
    i, j = np.arange(total)[:, None], np.arange(total + 1)
    barred = j - i > (total if max_jump is None else max_jump)
    for step in forced:
        barred |= (i < step % total) & (step % total < j)
    return np.where(barred, np.inf, costs)


def cheapest(costs: Floats, count: int) -> Path:
    """The path of `count` steps with the least sum of segment costs.

    Raises:
        PlanError: there is none.
    """
    table, total = _checked(costs, count), len(costs)
    best = np.full(total, np.inf)
    best[0] = 0.0
    parents = []
    for _ in range(count - 1):
        through = best[:, None] + table[:, :total]
        parents.append(through.argmin(0))
        best = through.min(0)
    final = best + table[:, total]
    return _walked_back(int(final.argmin()), parents, float(final.min()), count)


def flattest(costs: Floats, count: int) -> Path:
    """The path of `count` steps whose largest segment cost is least, then its second largest, ...

    Lexicographic minimax, and so also a solution of plain minimax.

    Raises:
        PlanError: there is none.
    """
    table, total = _checked(costs, count), len(costs)
    # Of the costs in falling order the lexicographically least; adding the same cost to two such
    # lists keeps their order, which is what makes the dynamic program exact.
    best: list[list[float] | None] = [[], *[None] * (total - 1)]
    parents = []
    for _ in range(count - 1):
        ends = [_flattest_into(j, best, table) for j in range(total)]
        parents.append(np.array([parent for parent, _ in ends]))
        best = [falling for _, falling in ends]
    last, falling = _flattest_into(total, best, table)
    return _walked_back(last, parents, np.inf if falling is None else 0.0, count)


def _flattest_into(
    j: int, best: Sequence[list[float] | None], costs: Floats
) -> tuple[int, list[float] | None]:
    """The best last step before j, and the negated costs so far in rising order."""
    parent, least = 0, None
    for i in range(min(j, len(best))):
        before = best[i]
        if before is None or not np.isfinite(costs[i, j]):
            continue
        falling = list(before)
        insort(falling, -float(costs[i, j]))
        # Negated and rising: the larger list has the smaller costs.
        if least is None or falling > least:
            parent, least = i, falling
    return parent, least


def cheapest_forecast(costs: Floats, count: int) -> Path:
    """The path with the least sum where a segment's cost depends on the computed step before it.

    That is so for forecasts from two computed steps. DPCache (2602.22654) keeps one predecessor for
    each step, see `one_parent`; over pairs of steps the program is exact in n T^3 operations.

    costs: `[T, T, T + 1]`, entry (i, j, k) for segment (j, k) when i was computed last before j;
    (0, 0, k) for the first segment, which has nothing before it.

    Raises:
        PlanError: there is none.
    """
    table, total = _checked(costs, count), len(costs)
    best = np.full((total, total), np.inf)
    best[0, 0] = 0.0
    parents = []
    for _ in range(count - 1):
        through = best[:, :, None] + table[:, :, :total]
        parents.append(through.argmin(0))
        best = through.min(0)
    final = best + table[:, :, total]
    i, j = np.unravel_index(int(final.argmin()), final.shape)
    if not np.isfinite(final[i, j]):
        raise _nothing(count)
    path = [int(j)]
    before, here = int(i), int(j)
    for parent in reversed(parents):
        path.append(before)
        before, here = int(parent[before, here]), before
    return tuple(reversed(path))


def one_parent(costs: Floats, count: int) -> Path:
    """DPCache's own recurrence for `cheapest_forecast`'s problem; may miss the best path.

    D[m, k] = min over j of D[m-1, j] + C[parent of j, j, k], with one parent for each (m, j).

    Raises:
        PlanError: it finds no path.
    """
    table, total = _checked(costs, count), len(costs)
    best, parent = np.full(total, np.inf), np.zeros(total, dtype=np.int64)
    best[0] = 0.0
    parents = []
    for _ in range(count - 1):
        through = best[:, None] + table[parent, np.arange(total), :total]
        parent, best = through.argmin(0), through.min(0)
        parents.append(parent)
    final = best + table[parent, np.arange(total), total]
    return _walked_back(int(final.argmin()), parents, float(final.min()), count)


def bubbled(
    rows: Sequence[Collection[int]], upstream: Collection[int], sources: Collection[int]
) -> tuple[Path, ...]:
    """BAC's bubbling union (2506.13456): when a source computes, units before it compute too.

    A unit that refreshes on inputs which earlier units have let go stale stores a wrong output and
    keeps it for many steps. So every unit in `upstream` computes at all steps at which any later
    unit in `sources` does. rows: the computed steps of each unit, units in the order they are
    called. A unit may be both; doing it twice changes nothing.
    """
    made = [set(row) for row in rows]
    for unit in upstream:
        made[unit].update(*(rows[source] for source in sources if source > unit))
    return tuple(tuple(sorted(row)) for row in made)


def _checked(costs: Floats, count: int) -> Floats:
    """`costs` with infinity where a segment would not lead forward."""
    total, ends = costs.shape[-2:]
    if ends != total + 1 or len(costs) != total:
        raise PlanError(f"a table of segment costs is [T, T + 1], got {list(costs.shape)}")
    if not 1 <= count <= total:
        raise PlanError(f"cannot compute {count} steps of a run of {total}")
    is_used = np.triu(np.ones((total, ends), dtype=bool), 1)
    if costs.ndim == 3:
        before = np.triu(np.ones((total, total), dtype=bool), 1)
        before[0, 0] = True
        is_used = before[:, :, None] & is_used
    if np.isnan(costs[is_used]).any():
        raise PlanError("the table of segment costs has entries that are not a number")
    return np.where(is_used, costs, np.inf)


def _walked_back(last: int, parents: Sequence[NDArray[np.int64]], cost: float, count: int) -> Path:
    if not np.isfinite(cost):
        raise _nothing(count)
    path = [last]
    for table in reversed(parents):
        path.append(int(table[path[-1]]))
    return tuple(reversed(path))


def _nothing(count: int) -> PlanError:
    return PlanError(
        f"no path of {count} computed steps keeps to the forced steps and the longest jump; "
        "compute more steps or force fewer"
    )
