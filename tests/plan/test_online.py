"""Online policies' decisions, numbers by hand; and the rules that may carry them."""

import math

import pytest

from blockcache.errors import PlanError
from blockcache.plan import (
    Codebook,
    Copy,
    Gate,
    ProbeRatio,
    Ranked,
    Rule,
    Site,
    Step,
    Taylor,
    Verified,
)


@pytest.mark.parametrize(
    ("gate", "change", "before", "expected"),
    [
        (Gate(0.1), 0.09, 5.0, False),
        (Gate(0.1), 0.1, 0.0, True),
        (Gate(0.0), 0.0, 0.0, True),
        (Gate(0.1), math.nan, 0.0, True),
        (Gate(0.1, accumulate=True), 0.04, 0.05, False),
        (Gate(0.1, accumulate=True), 0.05, 0.05, True),
        (Gate(0.1, accumulate=True), math.nan, 0.0, True),
    ],
)
def test_a_gate_computes_from_its_threshold_on(gate, change, before, expected):
    assert gate.should_compute(change, before) is expected


@pytest.mark.parametrize(
    ("coefficients", "change", "expected"),
    [
        ((), 0.25, 0.25),
        ((2.0, -1.0, 0.5), 0.5, 0.5),  # 2 / 4 - 1 / 2 + 1 / 2
        ((1.0, 0.0), 0.3, 0.3),
        ((-1.0, 0.0), 0.3, 0.0),  # a change is not negative
    ],
)
def test_a_polynomial_has_its_highest_power_first(coefficients, change, expected):
    assert Gate(rescale=coefficients).rescaled(change) == pytest.approx(expected)


def test_a_polynomial_of_no_number_is_none():
    assert math.isnan(Gate(rescale=(1.0, 0.0)).rescaled(math.nan))


@pytest.mark.parametrize(
    ("signal", "probes"),
    [
        ("first_block", True),
        ("probe", True),
        ("modulated", False),
        ("filtered", False),
        ("latent", False),
    ],
)
def test_which_gates_need_blocks_in_front(signal, probes):
    assert Gate(signal=signal).needs_probe is probes


# Ranked.


def test_ranked_is_full_at_its_interval_and_outside_its_window():
    policy = Ranked(3, window=(0.2, 0.8))
    times = [1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1]
    full = [i for i, t in enumerate(times) if policy.is_full(Step(i, 8, 0.0, t))]
    assert full == [0, 1, 3, 6, 7]


@pytest.mark.parametrize(
    ("ratio", "scale", "time", "expected"),
    [
        ((0.5,), 1.0, 0.3, {1, 3}),  # half of four
        ((0.3,), 1.0, 0.3, {1, 3}),  # 1.2, rounded up
        ((0.001, 0.0), 0.5, 0.5, {1}),  # a quarter of four at t = 500
        ((0.001, 0.0), 0.5, 1.0, {1, 3}),
        ((-1.0,), 1.0, 0.3, set()),
        ((9.0,), 1.0, 0.3, {0, 1, 2, 3}),
    ],
)
def test_ranked_chooses_the_least_similar(ratio, scale, time, expected):
    policy = Ranked(5, ratio, scale)
    assert policy.chosen(Step(1, 10, 0.0, time), [0.9, -0.5, 0.99, 0.2]) == expected


# Codebook.


@pytest.mark.parametrize(
    ("change", "expected"), [(0.0, 6), (0.079, 6), (0.08, 5), (0.3, 3), (0.4, 1), (math.inf, 1)]
)
def test_a_codebook_looks_up_the_interval(change, expected):
    assert Codebook().interval(change) == expected


# Verified.


def test_the_accepted_error_falls_to_its_floor():
    policy = Verified(threshold=0.1, decay=0.01, floor=0.02)
    accepted = [policy.limit(Step(i, 4, 0.0)) for i in range(4)]
    # 0.1 * 0.01 ** (0, 1/4, 1/2, 3/4) = 0.1, 0.0316, 0.01, 0.00316.
    assert accepted == pytest.approx([0.1, 0.1 / math.sqrt(10), 0.02, 0.02])


# Rules.


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Rule(Site("block"), Gate()), "a gate needs"),
        (lambda: Rule(Site("attn"), Gate()), "a gate needs"),
        (lambda: Rule(Site("model"), Gate()), "go together"),
        (lambda: Rule(Site("stack"), Gate(signal="latent")), "go together"),
        (lambda: Rule(Site("stack"), Gate(signal="modulated"), ProbeRatio()), "ProbeRatio needs"),
        (lambda: Rule(Site("stack"), Ranked(), Taylor(1)), "Ranked needs a 'block'"),
        (lambda: Rule(Site("block"), Ranked(), Copy()), "Ranked needs a 'block'"),
        (lambda: Rule(Site("block"), Codebook()), "Codebook needs"),
        (lambda: Rule(Site("block"), Verified()), "Verified needs"),
        (lambda: Rule(Site("span", 1), Gate(batch="sample"), Taylor(1)), "batch='sample' needs"),
        (lambda: Codebook(()), "increasing"),
        (lambda: Codebook(((0.2, 3), (0.1, 2))), "increasing"),
        (lambda: Codebook(((0.1, 0),)), "at least 1"),
        (lambda: Ranked(0), "n:"),
        (lambda: Verified(least=0), "least"),
        (lambda: Gate(-0.1), "threshold"),
        (lambda: Gate(signal="third_block"), "signal"),
    ],
)
def test_impossible_combinations_are_refused(make, why):
    with pytest.raises(PlanError, match=why):
        make()


def test_an_online_rule_has_no_schedule():
    rule = Rule(Site("span", 1), Gate())
    assert rule.schedule([Step(0, 2, 1.0), Step(1, 2, 0.5)], 1) is None
