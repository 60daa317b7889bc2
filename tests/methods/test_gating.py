"""Methods that decide from what they measure, against their rules written out.

The rules read plain floats and keep their state in local variables, one branch each.
"""

import numpy as np
import pytest
import torch

from blockcache import PlanError, recipes
from blockcache.methods.tea_cache import FITS
from paper_toys import SIZE, Transformer


def change(new, old):
    """Relative L1."""
    return ((new - old).abs().mean() / old.abs().mean()).item()


def is_mixed(walked, block="3"):
    """Both kinds of steps occur behind the first two, so that the gate has decided something."""
    computed = walked.steps_of(block)
    total = len(walked.ran)
    inner = [i for i in computed if 2 <= i < total - 1]
    return 0 < len(inner) < total - 3


def summing(model, words, signal, rescale, threshold, warmup, payload_of=None):
    """TeaCache's skeleton: add up rescaled changes of a signal, copy the stack's residual."""
    state = {"previous": None, "sum": 0.0, "residual": None}

    def denoise(i, timestep, latents):
        temb, entered = model.embed(timestep), model.tokens(latents)
        current = signal(i, temb, entered)
        is_full = i < warmup or i == 19
        if not is_full:
            state["sum"] += rescale(change(current, state["previous"]))
            is_full = state["sum"] >= threshold
        state["previous"] = current
        if not is_full:
            return model.output(entered + state["residual"])
        state["sum"] = 0.0
        h = entered
        for block in model.blocks:
            h = block(h, words, temb)
        state["residual"] = h - entered
        return model.output(h)

    return denoise


def tea_cache(rescale, threshold, warmup):
    def rule(model, words):
        def modulated(i, temb, entered):
            return model.blocks[0].norm1(entered, temb)[0]

        return summing(model, words, modulated, rescale, threshold, warmup)

    return rule


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_tea_cache_without_a_polynomial(agree, threshold):
    ours = agree(recipes.tea_cache(threshold=threshold), tea_cache(lambda d: d, threshold, 1))
    assert is_mixed(ours)


@pytest.mark.parametrize(("model", "threshold"), [("flux", 0.8), ("hunyuan_video", 0.4)])
def test_tea_cache_with_a_polynomial(agree, model, threshold):
    fitted = np.poly1d(FITS[model].coefficients)
    ours = agree(recipes.tea_cache(model, threshold), tea_cache(fitted, threshold, 1))
    assert is_mixed(ours)


@pytest.mark.parametrize(
    ("model", "threshold", "warmup", "first"),
    [("flux", 0.25, 1, 498.651651), ("wan_14b", 0.1, 5, -303318.725), ("mochi", 0.06, 1, -3512.4)],
)
def test_tea_cache_published_constants(model, threshold, warmup, first):
    (rule,) = recipes.tea_cache(model).rules
    assert rule.policy.threshold == threshold
    assert rule.guards[0].steps == warmup
    assert len(rule.policy.rescale) == 5
    assert rule.policy.rescale[0] == pytest.approx(first, rel=1e-4)


def test_tea_cache_names_the_models_it_knows():
    with pytest.raises(PlanError, match="no TeaCache polynomial for 'sdxl'.*flux"):
        recipes.tea_cache("sdxl")


def sea_cache(threshold, falloff):
    """The whole complex spectrum, times the product of the axes' gains, its mean made 1."""

    def gain_of(sigma):
        a, b = max(1.0 - sigma, 1e-6), max(sigma, 1e-6)
        gains = []
        for f in np.abs(np.fft.fftfreq(SIZE)):
            prior = f**-falloff if f > 0 else 1e16
            gains.append(a * prior / (a * a * prior + b * b))
        both = np.outer(gains, gains)
        return torch.from_numpy(both / both.mean()).float()

    def rule(model, words):
        def filtered(i, temb, entered):
            modulated = model.blocks[0].norm1(entered, temb)[0]
            picture = modulated.unflatten(1, (SIZE, SIZE))
            spectrum = torch.fft.fftn(picture, dim=(1, 2)) * gain_of(1 - i / 20)[None, :, :, None]
            return torch.fft.ifftn(spectrum, dim=(1, 2)).real

        return summing(model, words, filtered, lambda d: d, threshold, 1)

    return rule


@pytest.mark.parametrize(("threshold", "falloff"), [(0.3, 2.0), (0.6, 3.0)])
def test_sea_cache(agree, threshold, falloff):
    recipe = recipes.sea_cache(threshold, falloff, max_streak=100)
    assert is_mixed(agree(recipe, sea_cache(threshold, falloff)))


def db_cache(threshold, front, back, warmup, most, order):
    def rule(model, words):
        state = {"probe": None, "streak": 0, "stored": []}

        def denoise(i, timestep, latents):
            temb, entered = model.embed(timestep), model.tokens(latents)
            h, end = entered, len(model.blocks) - back
            for block in model.blocks[:front]:
                h = block(h, words, temb)
            probe = h - entered
            is_full = i < warmup or state["streak"] >= most
            is_full = is_full or change(probe, state["probe"]) >= threshold
            if is_full:
                state["probe"], state["streak"] = probe, 0
                before = h
                for block in model.blocks[front:end]:
                    h = block(h, words, temb)
                state["stored"] = [(i, h - before), *state["stored"]][: order + 1]
            else:
                state["streak"] += 1
                (t0, y0), *older = state["stored"]
                for t1, y1 in older:
                    y0 = y0 + (i - t0) / (t0 - t1) * (y0 - y1)
                h = h + y0
            for block in model.blocks[end:]:
                h = block(h, words, temb)
            return model.output(h)

        return denoise

    return rule


@pytest.mark.parametrize(
    ("threshold", "front", "back", "order", "most"),
    [(0.15, 1, 0, 0, 3), (0.15, 2, 1, 1, 3), (0.4, 1, 2, 1, 100)],
)
def test_db_cache(agree, threshold, front, back, order, most):
    recipe = recipes.db_cache(threshold, front, back, 3, most, order)
    rule = db_cache(threshold, front, back, 3, most, order)
    ours = agree(recipe, rule, make=lambda: Transformer(6))
    assert is_mixed(ours, str(front))
    assert ours.steps_of("0") == list(range(20))


def test_db_cache_has_the_published_sizes():
    """8 of FLUX's 57 blocks, none at the end, 8 of 50 steps."""
    (rule,) = recipes.db_cache().rules
    assert rule.site.limits(57) == (8, 57)
    assert [i for i in range(50) if rule.forced(type("S", (), {"index": i, "total": 50})(), 0)] == [
        *range(8)
    ]
    (rule,) = recipes.db_cache(back=0.14).rules
    assert rule.site.limits(57) == (8, 49)


def easy_cache(threshold, warmup):
    def rule(model, words):
        state = {"x": None, "computed": None, "gain": None, "sum": 0.0, "delta": None}

        def denoise(i, timestep, latents):
            is_full = i < warmup or i == 19 or state["gain"] is None
            if is_full:
                state["sum"] = 0.0
            else:
                moved = (latents - state["x"]).abs().mean().item()
                size = state["computed"][1].abs().mean().item()
                state["sum"] += state["gain"] * moved / size
                is_full = state["sum"] >= threshold
            state["x"] = latents
            if not is_full:
                return latents + state["delta"]
            state["sum"] = 0.0
            temb, h = model.embed(timestep), model.tokens(latents)
            for block in model.blocks:
                h = block(h, words, temb)
            output = model.output(h)
            if state["computed"] is not None:
                x, v = state["computed"]
                gain = (output - v).abs().mean() / (latents - x).abs().mean()
                state["gain"] = gain.item()
            state["computed"], state["delta"] = (latents, output), output - latents
            return output

        return denoise

    return rule


@pytest.mark.parametrize(("threshold", "warmup"), [(0.3, 4), (1.0, 2)])
def test_easy_cache(agree, threshold, warmup):
    ours = agree(recipes.easy_cache(threshold, warmup), easy_cache(threshold, warmup))
    assert is_mixed(ours)
    # Nothing at all runs in a reused step.
    assert [] in ours.ran


def di_cache(threshold, probe, warmup, most):
    def rule(model, words):
        state = {"state": None, "sum": 0.0, "probes": [], "rests": []}

        def denoise(i, timestep, latents):
            temb, entered = model.embed(timestep), model.tokens(latents)
            h = entered
            for block in model.blocks[:probe]:
                h = block(h, words, temb)
            moved = h - entered
            is_full = i < warmup or i == 19
            if not is_full:
                state["sum"] += change(h, state["state"])
                is_full = state["sum"] >= threshold
            state["state"], reached = h, h
            if not is_full:
                rest = state["rests"][0]
                if len(state["rests"]) > 1:
                    (new, old), (rest0, rest1) = state["probes"], state["rests"]
                    ratio = (moved - old).abs().mean() / (new - old).abs().mean()
                    rest = rest1 + ratio.clip(1.0, most) * (rest0 - rest1)
                return model.output(h + rest)
            state["sum"] = 0.0
            for block in model.blocks[probe:]:
                h = block(h, words, temb)
            state["probes"] = [moved, *state["probes"]][:2]
            state["rests"] = [h - reached, *state["rests"]][:2]
            return model.output(h)

        return denoise

    return rule


@pytest.mark.parametrize(
    ("threshold", "probe", "warmup", "by_step", "most"),
    [(0.4, 1, 0.2, 4, 1.5), (0.25, 2, 1, 1, 2.0)],
)
def test_di_cache(agree, threshold, probe, warmup, by_step, most):
    recipe = recipes.di_cache(threshold, probe, warmup, most=most)
    ours = agree(recipe, di_cache(threshold, probe, by_step, most))
    assert is_mixed(ours)
    assert ours.steps_of("0") == list(range(20))


def ada_cache(table, middle):
    """After each computed step the change of one block per step sets the date of the next one."""

    def rule(model, words):
        state = {"block": None, "at": 0, "due": 0, "residual": None}

        def denoise(i, timestep, latents):
            temb, entered = model.embed(timestep), model.tokens(latents)
            if 2 <= i < 18 and i < state["due"]:
                return model.output(entered + state["residual"])
            h = entered
            for number, block in enumerate(model.blocks):
                before, h = h, block(h, words, temb)
                if number == middle:
                    residual = h - before
            if state["block"] is not None:
                speed = change(residual, state["block"]) / (i - state["at"])
                state["due"] = i + next((n for limit, n in table if speed < limit), 1)
            state["block"], state["at"] = residual, i
            state["residual"] = h - entered
            return model.output(h)

        return denoise

    return rule


@pytest.mark.parametrize(
    ("settings", "table", "middle"),
    [
        ({}, ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2)), 2),
        ({"table": ((0.1, 5), (0.2, 3)), "block": 0.1}, ((0.1, 5), (0.2, 3)), 0),
    ],
)
def test_ada_cache(agree, settings, table, middle):
    ours = agree(recipes.ada_cache(**settings), ada_cache(table, middle))
    assert is_mixed(ours)


def spe_ca(threshold, decay, least, most, order, warmup):
    def through(stored, at):
        """The polynomial through the stored payloads, by Neville's scheme."""
        steps = [t for t, _ in stored]
        values = [y for _, y in stored]
        for width in range(1, len(steps)):
            values = [
                ((at - steps[n + width]) * values[n] - (at - steps[n]) * values[n + 1])
                / (steps[n] - steps[n + width])
                for n in range(len(values) - 1)
            ]
        return values[0]

    def rule(model, words):
        state = {"rests": [], "ends": [], "streak": 0}

        def full(i, temb, entered):
            h = entered
            for block in model.blocks[:-1]:
                h = block(h, words, temb)
            state["rests"] = [(i, h - entered), *state["rests"]][: order + 1]
            h = model.blocks[-1](h, words, temb)
            state["ends"] = [(i, h), *state["ends"]][: order + 1]
            state["streak"] = 0
            return model.output(h)

        def denoise(i, timestep, latents):
            temb, entered = model.embed(timestep), model.tokens(latents)
            if i < warmup or state["streak"] >= most:
                return full(i, temb, entered)
            h = model.blocks[-1](entered + through(state["rests"], i), words, temb)
            if state["streak"] >= least:
                expected = through(state["ends"], i)
                error = ((h - expected).abs() / (expected.abs() + 1e-6)).mean().item()
                if error >= max(0.01, threshold * decay ** (i / 20)):
                    return full(i, temb, entered)
            state["streak"] += 1
            return model.output(h)

        return denoise

    return rule


@pytest.mark.parametrize(
    ("threshold", "decay", "order", "least", "most"),
    [(0.1, 0.01, 4, 2, 5), (0.5, 0.5, 1, 1, 3), (2.0, 0.3, 2, 3, 6)],
)
def test_spe_ca(agree, threshold, decay, order, least, most):
    recipe = recipes.spe_ca(threshold, decay, least, most, order)
    ours = agree(recipe, spe_ca(threshold, decay, least, most, order, 3))
    assert is_mixed(ours, "0")
    assert any(ran.count("3") == 2 for ran in ours.ran), "no forecast was rejected"
