"""Published forecasters' weights against formulas on paper."""

import base64
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.errors import PlanError
from blockcache.plan import (
    BackwardDifference,
    ChannelTable,
    Chebyshev,
    Damped,
    Hermite,
    ProbeRatio,
    ScaleShift,
    Step,
    Taylor,
)
from blockcache.plan.forecasts import divided_differences


def steps(*indices, total=100):
    """Steps of these numbers."""
    return [Step(i, total, 0.5) for i in indices]


def forecast(predictor, function, at, anchors, total=100):
    """The predictor's value for `function` at step `at`."""
    known = steps(*anchors, total=total)
    weights = predictor.weights(Step(at, total, 0.5), known)
    return sum(w * function(s.index) for w, s in zip(weights, known, strict=False))


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ((0.0,), [[1]]),
        ((0.0, -2.0), [[1, 0], [0.5, -0.5]]),
        # (y0 - y1) / 1, and ((y0 - y1) / 1 - (y1 - y2) / 3) / 4.
        ((0.0, -1.0, -4.0), [[1, 0, 0], [1, -1, 0], [1 / 4, -1 / 3, 1 / 12]]),
    ],
)
def test_divided_differences_by_hand(nodes, expected):
    assert divided_differences(nodes) == pytest.approx(np.array(expected))


# Damped.


@pytest.mark.parametrize(
    ("predictor", "at", "anchors", "expected"),
    [
        (Damped(), 60, (57, 54), (1.3, -0.3)),
        # Whatever the gap, and however many anchors.
        (Damped(), 60, (50, 1, 0), (1.3, -0.3)),
        (Damped(), 60, (57,), (1.0,)),
        # From 0 at the beginning to 0.9 at the end: 0.54 at 60 of 100.
        (Damped(0.0, 0.9), 60, (57, 54), (1.54, -0.54)),
        (Damped(0.0, 0.0), 60, (57, 54), (1.0, 0.0)),
    ],
)
def test_damped_by_hand(predictor, at, anchors, expected):
    assert predictor.weights(steps(at)[0], steps(*anchors)) == pytest.approx(expected)


# Hermite.


@given(
    sigma=st.floats(0.1, 1.0),
    near=st.integers(1, 9),
    ahead=st.integers(1, 9),
)
def test_hermite_of_order_1_is_taylor_with_the_slope_times_2_sigma_squared(sigma, near, ahead):
    anchors = (20, 20 - near)
    ours = forecast(Hermite(1, sigma), float, 20 + ahead, anchors)
    assert ours == pytest.approx(20 + 2 * sigma**2 * ahead)


def test_hermite_of_order_1_is_taylor_at_one_over_root_two():
    ours = Hermite(1, math.sqrt(0.5)).weights(*steps(9), steps(6, 2))
    assert ours == pytest.approx(Taylor(1).weights(*steps(9), steps(6, 2)))


def test_hermite_of_order_2_by_hand():
    """Nodes 0, -2, -4 (even), 3 ahead, sigma 1/2: H1(1.5) = 3, H2(1.5) = 4 * 2.25 - 2 = 7.

    y0 + 1/2 * 3 * (y0 - y1) / 2 + 1/8 * 7 * (y0 - 2 y1 + y2) / 4.
    """
    expected = (1 + 0.75 + 7 / 32, -0.75 - 14 / 32, 7 / 32)
    ours = Hermite(2, 0.5).weights(*steps(13), steps(10, 8, 6))
    assert ours == pytest.approx(expected)


def test_hermite_of_order_2_does_not_pass_through_the_newest_payload():
    """At no distance it is off by sigma^2 times the second difference: 1/4 * 2 for t^2."""
    assert forecast(Hermite(2, 0.5), lambda t: t * t, 10, (10, 9, 8)) == pytest.approx(100 - 0.5)


@given(gaps=st.tuples(st.integers(1, 6), st.integers(1, 6)), ahead=st.integers(1, 6))
def test_hermite_takes_a_parabolas_second_derivative_at_uneven_gaps(gaps, ahead):
    """The term of order 2 of 3 t^2 is sigma^2 / 2 * H2(sigma k) * 6, whatever the gaps."""
    sigma, nodes = 0.5, (20, 20 - gaps[0], 20 - sum(gaps))

    def parabola(t):
        return 3.0 * t * t

    first = forecast(Hermite(1, sigma), parabola, 20 + ahead, nodes)
    second = forecast(Hermite(2, sigma), parabola, 20 + ahead, nodes)
    assert second - first == pytest.approx(sigma**2 / 2 * (4 * (sigma * ahead) ** 2 - 2) * 6)


def test_hermite_grows_into_its_order():
    assert Hermite(3).depth == 4
    assert Hermite(3).weights(*steps(5), steps(2)) == (1.0,)
    assert Hermite(3).weights(*steps(5), steps(2, 1)) == Hermite(1).weights(*steps(5), steps(2, 1))


# Backward difference.


@pytest.mark.parametrize("gap", [1, 3, 7])
def test_backward_difference_one_even_interval_ahead(gap):
    anchors = steps(30, 30 - gap, 30 - 2 * gap)
    ours = BackwardDifference().weights(*steps(30 + gap), anchors)
    assert ours == pytest.approx((7 / 3, -5 / 3, 1 / 3))


@given(
    gaps=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ahead=st.integers(1, 9),
    slope=st.integers(-5, 5),
)
def test_backward_difference_is_exact_on_a_line_at_uneven_gaps(gaps, ahead, slope):
    """A shipped port subtracts without dividing by the gap: 10.5 at step 9 of f(t) = t."""
    anchors = (30, 30 - gaps[0], 30 - sum(gaps))

    def line(t):
        return slope * t + 4.0

    ours = forecast(BackwardDifference(), line, 30 + ahead, anchors)
    assert ours == pytest.approx(line(30 + ahead), abs=1e-9)


def test_backward_difference_begins_as_a_copy_and_a_line():
    assert BackwardDifference().weights(*steps(9), steps(5)) == (1.0,)
    assert BackwardDifference().weights(*steps(9), steps(5, 3)) == pytest.approx((3.0, -2.0))


# Chebyshev.


def test_chebyshev_by_hand():
    """Degree 1 at steps 0 and 25 of 50: tau = -1 and 0; asked at 50, tau = 1; no mixing.

    Phi = [[1, -1], [1, 0]], Phi^T Phi + I = [[3, -1], [-1, 2]], its inverse [[2, 1], [1, 3]] / 5.
    phi^T inverse = [3, 4] / 5; times Phi^T: oldest (3 - 4) / 5, newest 3 / 5.
    """
    predictor = Chebyshev(degree=1, ridge=1.0, mix=1.0)
    ours = predictor.weights(Step(50, 50, 0.0), steps(25, 0, total=50))
    assert ours == pytest.approx((0.6, -0.2))


def test_chebyshev_mixes_with_a_line():
    """Halfway between (0.6, -0.2) and the line's (2, -1)."""
    predictor = Chebyshev(degree=1, ridge=1.0, mix=0.5)
    ours = predictor.weights(Step(50, 50, 0.0), steps(25, 0, total=50))
    assert ours == pytest.approx((1.3, -0.6))


@given(degree=st.integers(1, 4), seed=st.integers(0, 99))
def test_chebyshev_with_almost_no_ridge_follows_a_polynomial(degree, seed):
    coefficients = np.random.default_rng(seed).integers(-3, 4, degree + 1)

    def polynomial(t):
        return float(np.polyval(coefficients, t / 20))

    predictor = Chebyshev(degree, 1e-9, 1.0)
    anchors = (15, 12, 9, 6, 4, 2, 1, 0)
    ours = forecast(predictor, polynomial, 17, anchors, total=20)
    assert ours == pytest.approx(polynomial(17), abs=1e-3)


def test_chebyshev_keeps_its_history():
    assert Chebyshev().depth == 8
    assert Chebyshev(history=20).depth == 20


# What the engine completes.


def test_probe_ratio_without_a_probe_copies():
    assert ProbeRatio().depth == 2
    assert ProbeRatio(1.0, 2.0).weights(*steps(9), steps(5, 3)) == (1.0,)


def test_channel_tables_hold_what_was_packed():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 8
    table = ChannelTable.of("hidden_states", values)
    assert table.shape == (2, 3, 2, 2)
    assert np.array_equal(table.array(), values)
    assert ScaleShift((table,)).weights(*steps(9), steps(5)) == (1.0,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChannelTable("h", (1, 1, 2, 1), "no base64!"),
        lambda: ChannelTable("h", (1, 1, 2, 2), base64.b64encode(bytes(4)).decode()),
        lambda: ChannelTable("h", (1, 1, 3, 1), base64.b64encode(bytes(6)).decode()),
        lambda: ChannelTable.of("h", np.full((1, 1, 2, 1), 1e6)),
        lambda: ChannelTable.of("h", np.zeros((1, 2, 1))),
        lambda: Damped(-0.1),
        lambda: Hermite(0),
        lambda: Hermite(2, 0.0),
        lambda: Chebyshev(0),
        lambda: Chebyshev(ridge=0.0),
        lambda: Chebyshev(history=1),
        lambda: ProbeRatio(-1.0),
    ],
)
def test_impossible_forecasters_are_refused(make):
    with pytest.raises(PlanError):
        make()
