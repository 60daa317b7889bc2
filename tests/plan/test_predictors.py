"""Predictor weights against polynomials and formulas on paper."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.errors import PlanError
from blockcache.plan import Copy, Step, Taylor


def steps(*indices, sigmas=None):
    """Anchors at these step numbers, newest first."""
    return [Step(i, 100, 1.0 if sigmas is None else sigmas[k]) for k, i in enumerate(indices)]


def test_copy_takes_the_newest_payload():
    assert Copy().depth == 1
    assert Copy().weights(Step(9, 10, 0.1), steps(4, 1)) == (1.0,)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_depth_is_one_more_than_the_order(order):
    assert Taylor(order).depth == order + 1


@pytest.mark.parametrize(
    ("order", "at", "anchors", "expected"),
    [
        (0, 7, (4, 1), (1.0,)),
        # y1 + (y1 - y0) (x - x1) / (x1 - x0), at gaps of one, then uneven ones.
        (1, 3, (2, 1), (2.0, -1.0)),
        (1, 8, (5, 1), (1.75, -0.75)),
        # Lagrange: 4 * 5 / (2 * 3), 2 * 5 / (-2 * 1), 2 * 4 / (-3 * -1).
        (2, 6, (4, 2, 1), (10 / 3, -5.0, 8 / 3)),
        # Too few anchors: the degree drops.
        (2, 8, (5, 1), (1.75, -0.75)),
        (3, 8, (5,), (1.0,)),
        # Too many: the newest count.
        (1, 3, (2, 1, 0), (2.0, -1.0)),
    ],
)
def test_taylor_weights_by_hand(order, at, anchors, expected):
    weights = Taylor(order).weights(Step(at, 100, 0.5), steps(*anchors))
    assert weights == pytest.approx(expected, abs=1e-12)


@given(
    order=st.integers(0, 4),
    gaps=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    ahead=st.integers(1, 6),
    coefficients=st.lists(st.integers(-5, 5), min_size=5, max_size=5),
)
def test_taylor_is_exact_on_polynomials_at_uneven_gaps(order, gaps, ahead, coefficients):
    nodes = [0]
    for gap in gaps[:order]:
        nodes.append(nodes[-1] + gap)

    def polynomial(x):
        return sum(c * x**k for k, c in enumerate(coefficients[: order + 1]))

    at = nodes[-1] + ahead
    weights = Taylor(order).weights(Step(at, 100, 0.0), steps(*reversed(nodes)))
    predicted = sum(w * polynomial(x) for w, x in zip(weights, reversed(nodes), strict=True))
    scale = sum(abs(w * polynomial(x)) for w, x in zip(weights, reversed(nodes), strict=True))
    assert predicted == pytest.approx(polynomial(at), abs=1e-11 * (1 + scale))


def test_second_order_is_newtons_and_not_the_one_sided_slopes():
    """The reference code of TaylorSeer divides the difference of two backward slopes by the last
    gap and takes the newer slope at the anchor. On y = x^2 at 0, 1, 3 that predicts
    9 + 4 * 2 + (4 - 1) / 2 * 2^2 / 2 = 20 for x = 5 instead of 25."""
    weights = Taylor(2).weights(Step(5, 10, 0.0), steps(3, 1, 0))
    values = (9.0, 1.0, 0.0)
    assert sum(w * y for w, y in zip(weights, values, strict=True)) == pytest.approx(25.0)


def test_sigma_axis_uses_the_noise_level():
    anchors = steps(2, 1, sigmas=(0.5, 0.9))
    # (0.3 - 0.9) / (0.5 - 0.9) = 1.5
    weights = Taylor(1, "sigma").weights(Step(3, 4, 0.3), anchors)
    assert weights == pytest.approx((1.5, -0.5))


def test_equal_sigmas_do_not_divide_by_zero():
    """Heun's schedulers visit each noise level twice; the second visit adds no information."""
    at = Step(4, 9, 0.4)
    anchors = steps(3, 2, 1, sigmas=(0.6, 0.6, 0.8))
    weights = Taylor(1, "sigma").weights(at, anchors[:2])
    assert len(weights) <= 2
    assert weights[0] == 1.0
    assert sum(weights) == pytest.approx(1.0)
    full = Taylor(2, "sigma").weights(at, anchors)
    assert sum(full) == pytest.approx(1.0)
    # Linear through (0.6, 0.6) and (0.8, 0.8) gives 0.4 at 0.4.
    linear = sum(w * a.sigma for w, a in zip(full, anchors, strict=False))
    assert linear == pytest.approx(0.4)


def test_a_fading_change_counts_as_much_as_there_is_time_left():
    """By hand: linear weights (1.5, -0.5) at time 0.4 are 0.4 of that and 0.6 of a copy."""
    anchors = steps(2, 1, sigmas=(0.5, 0.9))
    weights = Taylor(1, "sigma", fade=True).weights(Step(3, 4, 0.3, 0.4), anchors)
    assert weights == pytest.approx((0.4 * 1.5 + 0.6, 0.4 * -0.5))
    # Without a time, three of four steps are done.
    unknown = Taylor(1, "sigma", fade=True).weights(Step(3, 4, 0.3), anchors)
    assert unknown == pytest.approx((0.25 * 1.5 + 0.75, 0.25 * -0.5))
    assert Taylor(0, fade=True).weights(Step(3, 4, 0.3), anchors[:1]) == (1.0,)


@pytest.mark.parametrize("make", [lambda: Taylor(-1), lambda: Taylor(5), lambda: Taylor(1.0)])
def test_impossible_orders_are_refused(make):
    with pytest.raises(PlanError, match="order"):
        make()


def test_unknown_axis_is_refused():
    with pytest.raises(PlanError, match="axis"):
        Taylor(1, "time")
