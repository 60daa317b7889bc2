"""The corrector's weights by hand, and what they are exact for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.errors import PlanError
from blockcache.plan import (
    Copy,
    Corrector,
    MaskTable,
    ProbeRatio,
    Rule,
    ScaleShift,
    Site,
    Taylor,
    steps_from_sigmas,
)
from blockcache.plan.spec import from_json, to_json

MODEL = Site("model")
TABLE = MaskTable(((0, 2),), 4)


def run(*strides):
    return steps_from_sigmas([1.0] * len(strides), strides=strides)


def test_a_line_by_hand():
    """Step 1 was y0 and should have been (y0 + y2) / 2; half the difference is added to y2."""
    first, gap, at = run(-0.2, -0.2, -0.2)
    assert Corrector(1).weights(at, [gap], [first], Copy()) == (1.5, -0.5)


def test_a_longer_present_step_needs_less():
    """The step that went wrong was a quarter of the present one."""
    first, gap, at = run(-0.1, -0.1, -0.4)
    assert Corrector(1).weights(at, [gap], [first], Copy()) == (1.125, -0.125)


def test_a_parabola_by_hand():
    """Through y0, y1 and y3 at 2: -y0 / 3 + y1 + y3 / 3; the prediction was 2 y1 - y0."""
    older, newer, gap, at = run(-1, -1, -1, -1)
    weights = Corrector(2).weights(at, [gap], [newer, older], Taylor(1))
    assert weights == pytest.approx((4 / 3, -1, 2 / 3))


@given(
    st.lists(st.floats(0.01, 1), min_size=9, max_size=9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_a_curve_of_its_order_ends_where_it_should(falls, order, gap, predictor_order):
    """Sum of stride times output over a gap and the step behind it is that of the true outputs."""
    steps = run(*(-fall for fall in falls))
    at, anchors = 3 + gap, (2, 1, 0)

    def true(i):
        return 2 - i + 0.5 * i**order

    predictor = Taylor(predictor_order)
    filled = [
        sum(
            w * true(a)
            for w, a in zip(
                predictor.weights(steps[i], [steps[a] for a in anchors]), anchors, strict=False
            )
        )
        for i in range(3, at)
    ]
    weights = Corrector(order).weights(
        steps[at], steps[3:at], [steps[a] for a in anchors], predictor
    )
    made = sum(w * true(i) for w, i in zip(weights, (at, *anchors), strict=True))
    walked = sum(s.stride * y for s, y in zip(steps[3 : at + 1], [*filled, made], strict=True))
    wanted = sum(steps[i].stride * true(i) for i in range(3, at + 1))
    assert walked == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert sum(weights) == pytest.approx(1)


def test_nothing_to_correct():
    first, gap, at = run(-0.2, -0.2, -0.2)
    assert Corrector().weights(at, [], [first], Copy()) is None
    assert Corrector().weights(*even(gap, at, first)) is None
    still = steps_from_sigmas([1.0] * 3, strides=[-0.2, -0.2, 0.0])[2]
    assert Corrector().weights(still, [gap], [first], Copy()) is None


def even(gap, at, first):
    """The same of a sampler that is no Euler."""
    bare = steps_from_sigmas([1.0] * 3)
    return bare[at.index], [bare[gap.index]], [bare[first.index]], Copy()


def test_rules_with_a_corrector():
    rule = Rule(MODEL, TABLE, Taylor(1), payload="output", corrector=Corrector(3))
    assert rule.depth == 3
    assert from_json(to_json(rule)) == rule
    assert Rule(MODEL, TABLE, Taylor(1), payload="output").depth == 2


@pytest.mark.parametrize(
    ("site", "payload", "predictor", "message"),
    [
        (Site("stack"), "output", Taylor(1), "needs the site 'model'"),
        (MODEL, "residual", Taylor(1), "the payload 'output'"),
        (MODEL, "output", ScaleShift(()), "cannot follow ScaleShift"),
        (MODEL, "output", ProbeRatio(), "cannot follow ProbeRatio"),
    ],
)
def test_rules_that_make_no_sense(site, payload, predictor, message):
    with pytest.raises(PlanError, match=message):
        Rule(site, TABLE, predictor, payload=payload, corrector=Corrector())
    with pytest.raises(PlanError, match="order"):
        Corrector(4)
