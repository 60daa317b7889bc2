"""Policies with masks worked out by hand."""

import math

import pytest

from blockcache.errors import PlanError
from blockcache.plan import (
    Bathtub,
    Every,
    Gate,
    Geometric,
    MaskTable,
    Step,
    even_steps,
    steps_from_sigmas,
)
from blockcache.plan.policies.static import bathtub_steps, geometric_steps


def computed(policy, total, units=1, steps=None):
    """The computed steps of every unit."""
    mask = policy.mask(steps or even_steps(total), units)
    return [[i for i, on in enumerate(row) if on] for row in mask]


@pytest.mark.parametrize(
    ("n", "total", "expected"),
    [
        (1, 5, [0, 1, 2, 3, 4]),
        (2, 5, [0, 2, 4]),
        (3, 10, [0, 3, 6, 9]),
        (7, 5, [0]),
        (10**9, 3, [0]),
    ],
)
def test_every(n, total, expected):
    assert computed(Every(n), total, units=2) == [expected, expected]


# Gaps 1, r, r^2, ... with the sum of all `count` gaps equal to `total`:
# 3 of 7 is r = 2 (1 + 2 + 4), so steps 0, 1, 3; 4 of 15 is r = 2; 3 of 13 is r = 3 (1 + 3 + 9).
@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [
        (3, 7, (0, 1, 3)),
        (4, 15, (0, 1, 3, 7)),
        (3, 13, (0, 1, 4)),
        (1, 9, (0,)),
        (5, 5, (0, 1, 2, 3, 4)),
        (2, 2, (0, 1)),
        # 1 + r + ... + r^4 = 10 at r = 1.3516: cumulated 0, 1, 2.35, 4.18, 6.65.
        (5, 10, (0, 1, 2, 4, 7)),
    ],
)
def test_geometric_steps_by_hand(count, total, expected):
    assert geometric_steps(count, total) == expected


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [
        (8, 50, (0, 3, 7, 13, 21, 32, 41, 47)),
        (6, 28, (0, 2, 6, 12, 20, 25)),
        (1, 4, (0,)),
        (3, 4, (0, 1, 3)),
        (9, 9, tuple(range(9))),
    ],
)
def test_bathtub_steps(count, total, expected):
    assert bathtub_steps(count, total) == expected


def test_a_bathtub_has_the_gaps_it_says():
    """1 at the beginning and at the end, 5 times as wide at 60 % of the run."""
    steps = bathtub_steps(20_000, 100_000)
    gaps = [steps[k + 200] - steps[k] for k in range(0, 19_800, 100)]
    widest = max(gaps)
    at = steps[100 * gaps.index(widest) + 100] / 100_000
    assert widest / gaps[0] == pytest.approx(5, rel=0.05)
    assert gaps[-1] / gaps[0] == pytest.approx(1, rel=0.05)
    assert at == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("total", [1, 2, 5, 8, 20, 28, 50, 100, 400, 1000])
@pytest.mark.parametrize("budget", [1e-9, 0.2, 0.34, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("policy", [Geometric, Bathtub])
def test_a_budget_is_kept_at_any_length(total, budget, policy):
    """400 steps at a half once overflowed a float, inside the user's run."""
    (steps,) = computed(policy(budget), total)
    assert len(steps) == min(total, max(1, round(budget * total)))
    assert steps[0] == 0
    assert steps == sorted(set(steps))
    assert steps[-1] < total
    if policy is Geometric:
        gaps = [b - a for a, b in zip(steps, [*steps[1:], total], strict=True)]
        # Rounding moves each end of a gap by at most a half.
        assert all(later >= earlier - 1 for earlier, later in zip(gaps, gaps[1:], strict=False))


def test_a_table_on_its_own_steps_is_itself_and_one_row_serves_all_units():
    table = MaskTable(((0, 2, 3), (0, 4)), 5)
    assert computed(table, 5, units=2) == [[0, 2, 3], [0, 4]]
    assert computed(MaskTable(((0, 2),), 5), 5, units=3) == [[0, 2]] * 3


def test_step_zero_is_computed_whatever_the_table_says():
    assert computed(MaskTable(((2,), ()), 4), 4, units=2) == [[0, 2], [0]]


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (10, [0, 1, 2, 5]),
        # scale 2: every table step i stands at 2 i.
        (20, [0, 2, 4, 10]),
        # scale 1/2: 0, 0.5, 1, 2.5 round (half to even) to 0, 0, 1, 2.
        (5, [0, 1, 2]),
        (1, [0]),
    ],
)
def test_a_table_without_sigmas_is_carried_over_by_share_of_the_run(total, expected):
    assert computed(MaskTable(((0, 1, 2, 5),), 10), total) == [expected]


def test_a_table_with_sigmas_is_carried_over_by_noise_level():
    table = MaskTable(((0, 1, 3),), 4, (1.0, 0.9, 0.5, 0.1))
    # A run that starts evenly: 0.9 is nearest to 1.0 (ties go to the earlier), 0.1 to 0.2.
    even = steps_from_sigmas([1.0, 0.8, 0.6, 0.4, 0.2])
    assert computed(table, 5, steps=even) == [[0, 4]]
    # A run that spends its steps late: 1.0 -> 0, 0.9 -> 0, 0.1 -> 2.
    late = steps_from_sigmas([0.7, 0.2, 0.12, 0.05])
    assert computed(table, 4, steps=late) == [[0, 2]]


def test_fits_asks_for_the_same_count_and_nearly_the_same_sigmas():
    table = MaskTable(((0, 1),), 3, (1.0, 0.5, 0.25))
    assert table.fits(steps_from_sigmas([1.0, 0.5, 0.25]))
    assert table.fits(steps_from_sigmas([1.0, 0.5005, 0.25]))
    assert not table.fits(steps_from_sigmas([1.0, 0.6, 0.25]))
    assert not table.fits(steps_from_sigmas([1.0, 0.5]))
    assert MaskTable(((0,),), 3).fits(steps_from_sigmas([3.0, 2.0, 1.0]))
    # Karras sigmas go to 80 and timesteps to 1000: there the tolerance is relative.
    assert MaskTable(((0,),), 1, (1000.0,)).fits(steps_from_sigmas([1000.9]))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Every(0), "n"),
        (lambda: Every(-2), "n"),
        (lambda: Every(2.5), "n"),
        (lambda: Every(True), "n"),
        (lambda: Geometric(0.0), "budget"),
        (lambda: Geometric(1.01), "budget"),
        (lambda: Geometric(math.nan), "budget"),
        (lambda: Geometric("0.3"), "budget"),
        (lambda: Gate(-0.1), "threshold"),
        (lambda: Gate(math.inf), "threshold"),
        (lambda: Gate(0.1, "last_block"), "signal"),
        (lambda: Gate(0.1, reference="first"), "reference"),
        (lambda: Gate(0.1, accumulate=1), "accumulate"),
        (lambda: MaskTable((), 3), "computed"),
        (lambda: MaskTable(((1, 0),), 3), "increasing"),
        (lambda: MaskTable(((1, 1),), 3), "increasing"),
        (lambda: MaskTable(((0, 1),), 3, (0.1, 0.5, 0.9)), "must not rise"),
        (lambda: MaskTable(((0, 3),), 3), r"0\.\.2"),
        (lambda: MaskTable(((-1, 0),), 3), r"0\.\.2"),
        (lambda: MaskTable(((0,),), 0), "total"),
        (lambda: MaskTable(((0,),), 10**6), "total"),
        (lambda: MaskTable(((0,),), 3, (1.0, 0.5)), "2 values for 3 steps"),
        (lambda: MaskTable(((0,),), 2, (1.0, math.nan)), "sigmas"),
    ],
)
def test_impossible_values_are_refused_with_the_field_named(make, word):
    with pytest.raises(PlanError, match=word):
        make()


def test_a_wrong_number_of_rows_is_a_plan_error():
    """It was a plain ValueError out of the middle of the user's run."""
    with pytest.raises(PlanError, match="3 rows for 2 units"):
        MaskTable(((0,),) * 3, 4).mask(even_steps(4), 2)


@pytest.mark.parametrize(
    ("gate", "change", "accumulated", "expected"),
    [
        (Gate(0.1), 0.0999, 5.0, False),
        (Gate(0.1), 0.1, 0.0, True),
        (Gate(0.1), 0.2, 0.0, True),
        (Gate(0.0), 0.0, 0.0, True),
        (Gate(0.1), math.nan, 0.0, True),
        (Gate(10.0), math.nan, 0.0, True),
        (Gate(0.1), math.inf, 0.0, True),
        (Gate(0.1, accumulate=True), 0.04, 0.05, False),
        (Gate(0.1, accumulate=True), 0.06, 0.05, True),
        (Gate(0.1, accumulate=True), 0.01, math.nan, True),
    ],
)
def test_gate_decides_by_hand(gate, change, accumulated, expected):
    assert gate.should_compute(change, accumulated) is expected


def test_even_steps_run_from_one_towards_zero():
    assert even_steps(4) == (
        Step(0, 4, 1.0),
        Step(1, 4, 0.75),
        Step(2, 4, 0.5),
        Step(3, 4, 0.25),
    )
    assert even_steps(0) == ()
