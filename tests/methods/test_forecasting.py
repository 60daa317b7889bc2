"""Methods that forecast the whole stack, against their rules written out."""

import math

import numpy as np
import pytest
import torch

import blockcache
from blockcache import recipes
from paper_toys import Transformer, text, walk
from toys import Scheduler


def forecasting(full, forecast, is_residual=True):
    """Full steps store what the stack added (or put out); the others ask `forecast(i, stored)`.

    stored: (step, payload) of all full steps so far, newest first.
    """

    def rule(model, words):
        stored = []

        def denoise(i, timestep, latents):
            temb, entered = model.embed(timestep), model.tokens(latents)
            h = entered
            if i in full:
                for block in model.blocks:
                    h = block(h, words, temb)
                stored.insert(0, (i, h - entered if is_residual else h))
            elif is_residual:
                h = entered + forecast(i, stored)
            else:
                h = forecast(i, stored)
            return model.output(h)

        return denoise

    return rule


def line(i, stored):
    """Through the last two."""
    if len(stored) < 2:
        return stored[0][1]
    (t0, y0), (t1, y1) = stored[:2]
    return y0 + (i - t0) / (t0 - t1) * (y0 - y1)


def test_taylor_seer_lite(agree):
    recipe = recipes.taylor_seer(6, 1, 3, site="stack")
    ours = agree(recipe, forecasting([0, 1, 2, 8, 14], line))
    assert ours.steps_of("0") == [0, 1, 2, 8, 14]


def test_taylor_seer_lite_of_order_2(agree):
    """The parabola through three payloads, by solving for its coefficients."""

    def parabola(i, stored):
        if len(stored) < 3:
            return line(i, stored)
        steps = np.array([float(t) for t, _ in stored[:3]])
        weights = np.linalg.solve(np.vander(steps, 3).T, np.array([i * i, i, 1.0]))
        return sum(float(w) * y for w, (_, y) in zip(weights, stored[:3], strict=True))

    recipe = recipes.taylor_seer(4, 2, 3, site="stack")
    agree(recipe, forecasting([0, 1, 2, 6, 10, 14, 18], parabola))


def hermite(order, sigma):
    """The paper's formula over its own recursion, which is right at even gaps."""
    polynomials = (lambda x: 1.0, lambda x: 2 * x, lambda x: 4 * x * x - 2)

    def forecast(i, stored):
        known = [y for _, y in stored[: order + 1]]
        k = i - stored[0][0]
        total = known[0]
        for n in range(1, len(known)):
            gap = stored[0][0] - stored[1][0]
            known = [(a - b) / gap for a, b in zip(known, known[1:], strict=False)]
            scale = sigma**n / math.factorial(n) * polynomials[n](sigma * k)
            total = total + scale * known[0]
        return total

    return forecast


@pytest.mark.parametrize(("order", "sigma"), [(2, 0.5), (2, 0.7), (1, 0.6)])
def test_hi_cache(agree, order, sigma):
    # One first full step, so that all gaps are even.
    recipe = recipes.hi_cache(4, order, sigma, warmup=1)
    agree(recipe, forecasting([0, 4, 8, 12, 16], hermite(order, sigma)))


def backward_difference(i, stored):
    """One step of BDF2 with variable steps, y(t) the unknown, y' from the parabola behind it."""
    if len(stored) < 3:
        return line(i, stored)
    (t0, y0), (t1, y1), (t2, y2) = stored[:3]
    step, before = float(i - t0), float(t0 - t1)
    ratio = step / before
    # Derivative at t0 of Lagrange's parabola through the three.
    slope = (
        y0 * ((t0 - t1) + (t0 - t2)) / ((t0 - t1) * (t0 - t2))
        + y1 * (t0 - t2) / ((t1 - t0) * (t1 - t2))
        + y2 * (t0 - t1) / ((t2 - t0) * (t2 - t1))
    )
    left = (1 + 2 * ratio) / (1 + ratio)
    return ((1 + ratio) * y0 - ratio**2 / (1 + ratio) * y1 + step * slope) / left


def test_fo_ca(agree):
    """With three first full steps the gaps are 1 and 1, then 5 and 1, then 5 and 5."""
    agree(recipes.fo_ca(), forecasting([0, 1, 2, 7, 12, 17], backward_difference))


def test_fo_ca_one_interval_ahead_has_the_published_weights():
    values = torch.eye(3).unbind()
    stored = [(12, values[0]), (8, values[1]), (4, values[2])]
    assert backward_difference(16, stored).tolist() == pytest.approx([7 / 3, -5 / 3, 1 / 3])
    (rule,) = recipes.fo_ca().rules
    steps = [type("At", (), {"index": n})() for n in (16, 12, 8, 4)]
    assert rule.predictor.weights(steps[0], steps[1:]) == pytest.approx([7 / 3, -5 / 3, 1 / 3])


def growing_window(total, warmup, window, growth):
    """The paper's counter: a step is computed when the steps since the last one fill the window."""
    full, waiting = [], 0
    for i in range(total):
        if i < warmup:
            full.append(i)
        elif (waiting + 1) % math.floor(window) == 0:
            full.append(i)
            window, waiting = window + growth, 0
        else:
            waiting += 1
    return full


def spectrum(total, degree, ridge, mix):
    """Chebyshev polynomials by their cosine, normal equations on the payloads themselves."""

    def basis(step):
        place = 2.0 * step / total - 1.0
        return torch.tensor([math.cos(m * math.acos(place)) for m in range(degree + 1)]).double()

    def forecast(i, stored):
        design = torch.stack([basis(t) for t, _ in stored])
        payloads = torch.stack([y.flatten() for _, y in stored]).double()
        normal = design.T @ design + ridge * torch.eye(degree + 1, dtype=torch.float64)
        coefficients = torch.cholesky_solve(design.T @ payloads, torch.linalg.cholesky(normal))
        fit = (basis(i) @ coefficients).view_as(stored[0][1])
        return (mix * fit + (1 - mix) * line(i, stored)).float()

    return forecast


@pytest.mark.parametrize(
    ("settings", "growth", "degree", "mix"),
    [({}, 0.75, 4, 0.5), ({"growth": 3.0, "degree": 2, "mix": 1.0}, 3.0, 2, 1.0)],
)
def test_spectrum(agree, settings, growth, degree, mix):
    full = growing_window(30, 5, 2.0, growth)
    rule = forecasting(full, spectrum(30, degree, 0.1, mix), is_residual=False)
    ours = agree(recipes.spectrum(**settings), rule, 30)
    assert ours.steps_of("1") == full


@pytest.mark.parametrize(("growth", "count"), [(0.75, 14), (3.0, 10)])
def test_spectrum_computes_the_published_share_of_50_steps(growth, count):
    assert len(growing_window(50, 5, 2.0, growth)) == count


@pytest.mark.parametrize("name", ["hi_cache", "fo_ca"])
def test_forecasts_of_sub_layers(name):
    """`site="sub_layers"`: every kind on the same schedule, the blocks themselves always run."""
    model, scheduler, words = Transformer(), Scheduler(20), text()
    recipe = recipes.by_name(name, interval=5, site="sub_layers")
    blockcache.enable(model, recipe, scheduler=scheduler)
    ours = walk(model.log, lambda i, t, x: model(x, t, words), scheduler)
    for part in ("0.attn1", "1.attn2", "3.ff"):
        assert ours.steps_of(part) == [0, 1, 2, 7, 12, 17]
    assert ours.steps_of("2") == list(range(20))
    assert torch.isfinite(ours.outputs[-1]).all()
