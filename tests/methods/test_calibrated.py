"""Recipes that are made from a trace, each against its paper's rule written out straight."""

import math
import random

import numpy as np
import pytest

import blockcache
from blockcache import recipes
from blockcache.errors import PlanError
from blockcache.plan import ChannelTable, Copy, Fingerprint, Fitted, Taylor
from blockcache.plan.trace import Place, SiteTrace, Trace

STEPS, PROMPTS, BLOCKS, SIZE = 12, 3, 4, 20


def tables_of(values):
    """The tables of payloads `[P, T, D]`; tokens are the first axis of D = 5 x 4."""
    return SiteTrace.of(values.reshape(*values.shape[:2], 5, 4))


def walk(seed, scale=0.3):
    """Payloads `[P, T, D]` that drift fast at first and slowly later."""
    numbers = np.random.default_rng(seed).normal(size=(PROMPTS, STEPS, SIZE))
    pace = scale * np.linspace(1.5, 0.1, STEPS)[None, :, None]
    return 1.0 + np.cumsum(numbers * pace, axis=1)


class Known:
    """Payloads by place, and the trace that was made of them."""

    def __init__(self, **changes):
        places = [("stack", 0, "residual"), ("stack", 0, "output"), ("model", 0, "output")]
        places += [("block", i, "residual") for i in range(BLOCKS)]
        places += [(scope, i, "output") for scope in ("attn", "mlp") for i in range(BLOCKS)]
        self.values = {place: walk(seed) for seed, place in enumerate(places)}
        sites = {Place(*place, "0"): tables_of(v) for place, v in self.values.items()}
        known = dict(fingerprint=Fingerprint("Toy", "abc", BLOCKS), block_ms=(1.0,) * BLOCKS)
        self.trace = Trace.of(sites, **{**known, **changes})


@pytest.fixture(scope="module")
def known():
    return Known()


def computed(recipe, rule=0, row=0):
    return recipe.rules[rule].policy.computed[row]


def relative(values, i, j):
    """Mean over prompts of |y_i - y_j| / |y_j|."""
    difference = np.abs(values[:, i] - values[:, j]).mean(1)
    return float((difference / np.abs(values[:, j]).mean(1)).mean())


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.4, 1.0, 50.0])
def test_block_caching_sums_changes_up_to_the_threshold(known, threshold):
    recipe = recipes.block_caching(known.trace, threshold)
    for block in range(BLOCKS):
        values = known.values["block", block, "residual"]
        expected, start = [0], 0
        for t in range(1, STEPS):
            # A cache written at `start` is kept while the changes since then sum up to delta.
            if sum(relative(values, s - 1, s) for s in range(start + 1, t + 1)) > threshold:
                expected.append(t)
                start = t
        assert computed(recipe, row=block) == tuple(expected)
    rule = recipe.rules[0]
    assert (rule.site.scope, rule.payload, rule.predictor) == ("block", "residual", Copy())


@pytest.mark.parametrize(("threshold", "reach"), [(0.0, 3), (0.3, 3), (0.6, 2), (9.0, 3), (9.0, 5)])
def test_smooth_cache_takes_the_longest_reuse_below_the_threshold(known, threshold, reach):
    recipe = recipes.smooth_cache(known.trace, threshold, reach)
    assert [rule.site.scope for rule in recipe.rules] == ["attn", "mlp"]
    for number, kind in enumerate(("attn", "mlp")):
        blocks = [known.values[kind, i, "output"] for i in range(BLOCKS)]
        expected, at = [0], 0
        while at < STEPS - 1:
            for k in range(reach, -1, -1):
                if at + k + 1 > STEPS - 1:
                    continue
                skipped = range(at + 1, at + k + 1)
                errors = [np.mean([relative(v, at, s) for v in blocks]) for s in skipped]
                if all(e <= threshold for e in errors):
                    break
            at += k + 1
            expected.append(at)
        assert computed(recipe, number) == tuple(expected)


@pytest.mark.parametrize(
    ("threshold", "streak", "retention"), [(0.06, 3, 0.2), (0.4, 2, 0.0), (9, 4, 0.5)]
)
def test_mag_cache_sums_the_deviation_of_the_running_product(known, threshold, streak, retention):
    curve = known.trace.at().magnitude.mean(0)
    product, error, skips, expected = 1.0, 0.0, 0, [0]
    for t in range(1, STEPS):
        product, skips = product * curve[t], skips + 1
        error += abs(1 - product)
        if error < threshold and skips <= streak and t >= retention * STEPS:
            continue
        expected.append(t)
        product, error, skips = 1.0, 0.0, 0
    recipe = recipes.mag_cache(known.trace, float(threshold), streak, retention)
    assert computed(recipe) == tuple(expected)
    assert recipe.is_static()


def every_path(count, forced):
    """All paths of `count` steps from 0."""
    from itertools import combinations

    for rest in combinations(range(1, STEPS), count - 1):
        path = (0, *rest)
        if set(forced) <= set(path):
            yield path


@pytest.mark.parametrize("count", [6, 7, 8])
def test_dp_cache_has_the_least_summed_forecast_error(known, count):
    values = known.values["stack", 0, "output"].astype(np.float32)

    def cost(path):
        total = 0.0
        for n, j in enumerate(path):
            end = path[n + 1] if n + 1 < len(path) else STEPS
            if n and end - j > round(0.3 * STEPS) or (not n and end > round(0.3 * STEPS)):
                return math.inf
            for t in range(j + 1, end):
                guess = values[:, j]
                if n:
                    i = path[n - 1]
                    guess = guess + (t - j) / (j - i) * (values[:, j] - values[:, i])
                total += float(np.abs(guess - values[:, t]).mean())
        return total

    expected = min(every_path(count, (0, 1, 2, STEPS - 1)), key=cost)
    recipe = recipes.dp_cache(known.trace, count / STEPS)
    assert cost(computed(recipe)) == pytest.approx(cost(expected), rel=1e-5)
    assert recipe.rules[0].predictor == Taylor(1)


def test_le_mi_ca_has_the_smallest_largest_error():
    numbers = np.random.default_rng(3).uniform(size=(STEPS, STEPS))
    errors = np.where(np.triu(np.ones((STEPS, STEPS)), 2) > 0, numbers, np.nan)
    trace = Known(segments=errors).trace

    def falling(path):
        pairs = zip(path, path[1:], strict=False)
        return sorted((errors[i, j] if j > i + 1 else 0.0 for i, j in pairs), reverse=True)

    for count in (4, 6):
        expected = min(every_path(count, (0, STEPS - 1)), key=falling)
        assert falling(computed(recipes.le_mi_ca(trace, count / STEPS))) == falling(expected)


def test_l2p_solves_every_row_by_least_squares(known):
    values = known.values["model", 0, "output"]
    recipe = recipes.l2p(known.trace, budget=0.4, history=3, ridge=0.0)
    fitted, steps = recipe.rules[0].predictor, computed(recipe)
    assert isinstance(fitted, Fitted)
    for t in set(range(STEPS)) - set(steps):
        anchors = [s for s in reversed(steps) if s < t][:3]
        assert list(fitted.anchors[t]) == anchors
        # Each prompt counts the same: its rows are divided by the size of what is guessed.
        size = np.sqrt((values[:, t] ** 2).mean(1))[:, None]
        rows = np.concatenate([values[p, anchors].T / size[p] for p in range(PROMPTS)])
        wanted = np.concatenate([values[p, t] / size[p] for p in range(PROMPTS)])
        expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        np.testing.assert_allclose(fitted.table[t], expected, rtol=1e-6)


def test_bud_cache_finds_the_best_of_few_masks():
    """The error is the squared distance of the mask from a hidden one: one well, no traps."""
    hidden = (0, 1, 2, 5, 9, 17)
    tried = []

    def score(recipe):
        mask = computed(recipe)
        tried.append(mask)
        return sum((a - b) ** 2 for a, b in zip(mask, hidden, strict=True)) + 1.0

    found = recipes.bud_cache(score, steps=20, budget=0.3, proposals=60, rounds=20)
    assert computed(found) == hidden
    assert len(tried) == len(set(tried)), "what was run once is not run again"
    again = recipes.bud_cache(score, steps=20, budget=0.3, proposals=60, rounds=20)
    assert again == found


def test_bud_cache_keeps_the_first_quarter():
    chance = random.Random(1)
    seen = []

    def score(recipe):
        seen.append(computed(recipe))
        return 1.0 + chance.random()

    recipes.bud_cache(score, steps=30, budget=0.4, proposals=40, rounds=1)
    assert all(mask[:3] == (0, 1, 2) and len(mask) == 12 for mask in seen)


def test_golden_path_is_the_published_list():
    recipe = recipes.golden_path(9, "flux")
    assert computed(recipe) == (0, 1, 2, 3, 5, 8, 13, 27, 49)
    for (model, count), steps in blockcache.methods.golden_path.__globals__["_SCHEDULES"].items():
        assert len(steps) == count == len(computed(recipes.golden_path(count, model)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda trace: recipes.block_caching(trace, -1.0), "threshold must be 0 or larger"),
        (lambda trace: recipes.block_caching(trace, math.nan), "threshold must be 0 or larger"),
        (lambda trace: recipes.smooth_cache(trace, 0.1, 0), "reach >= 1"),
        (lambda trace: recipes.mag_cache(trace, retention=1.5), "retention in 0..1"),
        (lambda trace: recipes.dp_cache(trace, 0.0), "budget is a share"),
        (lambda trace: recipes.dp_cache(trace, 0.3, forced=12, max_jump=0.05), "no path"),
        (lambda trace: recipes.le_mi_ca(trace, 0.4), "segments"),
        (lambda trace: recipes.l2p(trace, history=0), "history >= 1"),
        (lambda trace: recipes.golden_path(10), "no searched schedule"),
        (lambda trace: recipes.bud_cache(lambda recipe: 1.0, 50, 0.02), "two computed steps"),
    ],
)
def test_impossible_settings_are_refused(known, make, words):
    with pytest.raises(PlanError, match=words):
        make(known.trace)


@pytest.mark.parametrize("name", [n for n in recipes.names() if recipes.needs_trace(n)])
def test_by_name_alone_they_ask_for_a_trace(name):
    with pytest.raises(PlanError, match=f"'{name}' is calibrated: make a trace"):
        recipes.by_name(name)


def test_by_name_alone_a_search_asks_for_its_score():
    with pytest.raises(PlanError, match="'bud_cache' cannot be made without score: see help"):
        recipes.by_name("bud_cache")


def test_channel_tables_refuse_what_does_not_fill_them():
    table = ChannelTable.of("hidden_states", np.ones((2, 3, 2, 4), np.float32))
    assert table.array().shape == (2, 3, 2, 4)
    with pytest.raises(PlanError, match="does not fill"):
        ChannelTable("hidden_states", (2, 3, 2, 5), table.values)
    with pytest.raises(PlanError, match="not base64"):
        ChannelTable("hidden_states", (2, 3, 2, 4), "?")
    with pytest.raises(PlanError, match="finite in fp16"):
        ChannelTable.of("hidden_states", np.full((1, 1, 2, 1), 1e9))


class TimeKnown(Known):
    """A trace of a model whose blocks modulate inside: it has the time embedding alone."""

    def __init__(self):
        super().__init__()
        # The same for every prompt, as a time embedding is.
        self.time = np.repeat(walk(77)[:1], PROMPTS, axis=0)
        self.trace.sites[Place("time", 0, "input", "0")] = tables_of(self.time)


def test_tea_cache_fits_the_polynomial_and_compiles_the_schedule():
    known = TimeKnown()
    output = known.values["model", 0, "output"]

    def change(values, p, t):
        return np.abs(values[p, t] - values[p, t - 1]).mean() / np.abs(values[p, t - 1]).mean()

    places = [(p, t) for p in range(PROMPTS) for t in range(1, STEPS)]
    x = np.array([change(known.time, p, t) for p, t in places])
    y = np.array([change(output, p, t) for p, t in places])
    design = np.stack([x**4, x**3, x**2, x, np.ones_like(x)], axis=1)
    best = np.linalg.lstsq(design, y, rcond=None)[0]
    recipe = recipes.tea_cache(trace=known.trace, threshold=0.5, warmup=2, cooldown=1)
    total, expected = 0.0, [0]
    for t in range(1, STEPS):
        total += max(0.0, float(np.polyval(best, change(known.time, 0, t))))
        if total >= 0.5:
            expected.append(t)
            total = 0.0
    assert recipe.is_static()
    assert computed(recipe) == tuple(expected)
    assert len(expected) < STEPS


def test_tea_cache_stays_online_where_the_prompt_has_a_say(known):
    site = tables_of(walk(78))
    trace = Known().trace
    trace.sites[Place("time", 0, "input", "0")] = site
    gate = recipes.tea_cache(trace=trace).rules[0].policy
    assert gate.signal == "modulated"
    assert len(gate.rescale) == 5
    with pytest.raises(PlanError, match="not both"):
        recipes.tea_cache("flux", trace=trace)
    with pytest.raises(PlanError, match="no input of time"):
        recipes.tea_cache(trace=known.trace)
