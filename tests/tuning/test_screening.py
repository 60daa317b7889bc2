from itertools import combinations

import numpy as np
import pytest

from blockcache.errors import PlanError
from blockcache.plan import Copy, Taylor, even_steps, steps_from_sigmas
from blockcache.plan.policies.static import bathtub_steps, geometric_steps
from blockcache.plan.trace import Place, SiteTrace, Trace
from blockcache.tuning.screening import Screen, strides

T = 9
SIGMAS = tuple(np.linspace(1, 0, T, endpoint=False) ** 1.5)


def trace_of(values, branches="0"):
    """A trace of the model's output `[P, T, D]`, every branch the same."""
    site = SiteTrace.of(values)
    return Trace.of({Place("model", 0, "output", b): site for b in branches}, sigmas=SIGMAS)


@pytest.fixture
def values():
    return np.random.default_rng(1).normal(size=(2, T, 30)).cumsum(1)


def cost_by_hand(values, mask, predictor, amplification=1.0):
    """Square of what every segment moves the latents by, payloads predicted one by one."""
    steps, falls = steps_from_sigmas(SIGMAS), -np.diff([*SIGMAS, 0.0])
    total = 0.0
    for y in values:
        y = y / np.sqrt((y**2).mean())
        for k, i in enumerate(mask):
            end = mask[k + 1] if k + 1 < len(mask) else T
            moved = np.zeros(y.shape[1])
            anchors = [a for a in reversed(mask[: k + 1])][:2]
            for t in range(i + 1, end):
                weights = predictor.weights(steps[t], [steps[a] for a in anchors])
                guess = sum(w * y[a] for w, a in zip(weights, anchors, strict=False))
                moved += falls[t] * (y[t] - guess)
            total += (moved**2).mean() * amplification ** (2 * (1 - i / T)) / len(values)
    return total


@pytest.mark.parametrize("predictor", [Copy(), Taylor(1)])
@pytest.mark.parametrize("mask", [(0,), (0, 1, 5), (0, 3, 4, 8), tuple(range(T))])
def test_a_masks_cost_is_what_its_segments_move_the_latents_by(values, predictor, mask):
    screen = Screen(trace_of(values), predictor)
    for amplification in (1.0, 3.0):
        expected = cost_by_hand(values, mask, predictor, amplification)
        assert screen.cost(mask, amplification) == pytest.approx(expected, abs=1e-12)


def test_the_screened_mask_is_the_best_of_all_masks(values):
    screen = Screen(trace_of(values))
    found = {c.origin: c.computed for c in screen.candidates(4)}
    for amplification in (1.0, 10.0):
        masks = [(0, *rest) for rest in combinations(range(1, T), 3)]
        best = min(masks, key=lambda mask: cost_by_hand(values, mask, Taylor(1), amplification))
        candidates = found.values()
        assert any(
            screen.cost(c, amplification) == pytest.approx(screen.cost(best, amplification))
            for c in candidates
        )
    assert found["screened 1"] == min(masks, key=screen.cost)


def test_candidates_are_different_and_hold_the_uncalibrated_ones(values):
    for budget in (2, 4, 7):
        found = [c.computed for c in Screen(trace_of(values)).candidates(budget)]
        assert len(set(found)) == len(found) >= 1
        assert all(len(c) == budget and c[0] == 0 for c in found)
        assert {geometric_steps(budget, T), bathtub_steps(budget, T)} <= set(found)


def test_branches_add_up(values):
    one, two = Screen(trace_of(values)), Screen(trace_of(values, "01"))
    assert two.cost((0, 3)) == pytest.approx(2 * one.cost((0, 3)))


def test_a_payload_that_moves_on_a_line_costs_nothing_after_two_steps(values):
    line = values[:, :1] + np.arange(T)[None, :, None] * values[:, 1:2]
    screen = Screen(trace_of(line))
    assert screen.cost((0, 1)) == pytest.approx(0, abs=1e-12)
    assert screen.cost((0, 2)) > 1e-6


def test_longer_histories_are_refused(values):
    with pytest.raises(PlanError, match="two anchors at most"):
        Screen(trace_of(values), Taylor(2))


def test_strides_are_the_falls_of_the_noise_level():
    np.testing.assert_allclose(strides(steps_from_sigmas([1.0, 0.7, 0.2])), [0.3, 0.5, 0.2])
    # Levels that do not fall say nothing.
    np.testing.assert_allclose(strides(steps_from_sigmas([0.2, 0.7, 1.0])), [1 / 3] * 3)
    assert strides(even_steps(7)).sum() == pytest.approx(1)
