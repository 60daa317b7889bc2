"""Methods that reuse attention and MLP outputs, against their rules written out."""

import pytest
import torch

import blockcache
from blockcache import PlanError, recipes
from blockcache.plan import Step, Taylor
from paper_toys import Transformer, UNet
from toys import Scheduler


def one_by_one(model, words, output_of):
    """A denoiser whose sub-layers are asked for by `output_of(step, name, module, *inputs)`.

    The block's own arithmetic is written out here: the gates around the sub-layers stay fresh.
    """

    def denoise(i, timestep, latents):
        temb, h = model.embed(timestep), model.tokens(latents)
        for block in model.blocks:
            block.note()
            normed, gate = block.norm1(h, temb)
            h = h + gate * output_of(i, "attn", block.attn1, normed)
            h = h + output_of(i, "cross", block.attn2, h, words)
            h = h + gate * output_of(i, "mlp", block.ff, h)
        return model.output(h)

    return denoise


def fora(interval):
    def rule(model, words):
        kept = {}

        def output_of(i, kind, module, *inputs):
            if i % interval == 0:
                kept[module] = module(*inputs)
            return kept[module]

        return one_by_one(model, words, output_of)

    return rule


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_fora(agree, interval):
    ours = agree(recipes.fora(interval), fora(interval))
    assert ours.steps_of("2.attn1") == list(range(0, 20, interval))
    assert ours.steps_of("2") == list(range(20))


def pab(ranges, window):
    def rule(model, words):
        kept = {}

        def output_of(i, kind, module, *inputs):
            # Step i of 20 is at timestep 1000 - 50 i; counted from the run's beginning.
            timestep = 1000.0 - 50.0 * i
            is_inside = window[0] <= timestep < window[1]
            if kind not in ranges or not is_inside or i % ranges[kind] == 0:
                kept[module] = module(*inputs)
            return kept[module]

        return one_by_one(model, words, output_of)

    return rule


@pytest.mark.parametrize(
    ("settings", "ranges", "window"),
    [
        ({}, {"attn": 2, "cross": 6}, (100.0, 850.0)),
        ({"attn": 4, "cross": 3, "stop": 0.72}, {"attn": 4, "cross": 3}, (100.0, 720.0)),
    ],
)
def test_pab(agree, settings, ranges, window):
    ours = agree(recipes.pab(**settings), pab(ranges, window))
    assert ours.steps_of("0.ff") == list(range(20))


def test_pab_counts_from_the_beginning_of_the_run(agree):
    """Window 100 to 850 are steps 4 to 18: cross-attention runs at 6, 12 and 18, not at 4 + 6 k."""
    ours = agree(recipes.pab(), pab({"attn": 2, "cross": 6}, (100.0, 850.0)))
    assert ours.steps_of("1.attn2") == [0, 1, 2, 3, 6, 12, 18, 19]


def faster_cache(interval, start, weight):
    def rule(model, words):
        kept = {}  # module: its last two computed outputs, newest first

        def output_of(i, kind, module, *inputs):
            if kind != "mlp" and i >= start and i % interval != 0:
                new, old = kept[module]
                return new + weight(i) * (new - old)
            output = module(*inputs)
            kept[module] = [output, *kept.get(module, [])][:2]
            return output

        return one_by_one(model, words, output_of)

    return rule


@pytest.mark.parametrize(
    ("settings", "interval", "start", "weight"),
    [
        ({}, 3, 8, lambda i: 0.3),  # 0.36 of 20 steps: from step 8 on
        ({"interval": 4, "weight": 0.0, "last_weight": 0.9}, 4, 8, lambda i: 0.9 * i / 20),
    ],
)
def test_faster_cache(agree, settings, interval, start, weight):
    agree(recipes.faster_cache(**settings), faster_cache(interval, start, weight))


def test_a_weight_of_faster_cache_does_not_compound():
    """The published CFG part multiplies its difference in place: 1.1, 1.21, 1.331 in a streak.

    Here the k-th step of a streak gives what the first one gave: stored outputs stand still.
    """
    model, scheduler = Transformer(), Scheduler(20)
    blockcache.enable(model, recipes.faster_cache(interval=6), scheduler=scheduler)
    seen = []
    model.blocks[0].ff.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    words = torch.ones(1, 5, 16)
    with torch.no_grad():
        for i in range(18):
            scheduler.step_index = i
            # Inputs stand still from step 13 on, so what reaches the MLP can only differ by reuse.
            now = x * (1.0 + min(i, 13) / 10)
            model(now, scheduler.timesteps[13], words)
    blockcache.disable(model)
    assert all(torch.equal(seen[i], seen[13]) for i in (14, 15, 16, 17))
    assert not torch.equal(seen[12], seen[13])


# TaylorSeer.


def full_steps(interval, warmup, total):
    """The paper's counter: `warmup` full steps, then one after interval - 1 others."""
    counter, full = 0, []
    for i in range(total):
        if i < warmup or counter == interval - 1:
            full.append(i)
            counter = 0
        else:
            counter += 1
    return full


def published_taylor(order, full):
    """The paper's recursion: each difference by the newest gap, and no more orders than known."""

    def rule(model, words):
        kept = {}  # module: (step, factors)

        def output_of(i, kind, module, *inputs):
            if i in full:
                factors = [module(*inputs)]
                if module in kept:
                    at, old = kept[module]
                    for n in range(min(order, len(old))):
                        factors.append((factors[n] - old[n]) / (i - at))
                kept[module] = (i, factors)
                return factors[0]
            at, factors = kept[module]
            total, power = 0.0, 1.0
            for n, factor in enumerate(factors):
                total = total + power * factor
                power = power * (i - at) / (n + 1)
            return total

        return one_by_one(model, words, output_of)

    return rule


@pytest.mark.parametrize(("interval", "warmup"), [(6, 3), (4, 1), (3, 2)])
def test_taylor_seer(agree, interval, warmup):
    full = full_steps(interval, warmup, 20)
    recipe = recipes.taylor_seer(interval, 1, warmup)
    ours = agree(recipe, published_taylor(1, full))
    assert ours.steps_of("3.ff") == full
    assert ours.steps_of("3") == list(range(20))


def test_taylor_seer_counts_from_the_last_of_the_first_full_steps():
    assert full_steps(6, 3, 20) == [0, 1, 2, 8, 14]


def published_forecast(order, nodes, values, at):
    """The same recursion on numbers."""
    previous, known = [], []
    for n, (node, value) in enumerate(zip(nodes, values, strict=True)):
        known = [value]
        for m in range(min(order, len(previous))):
            known.append((known[m] - previous[m]) / (node - nodes[n - 1]))
        previous = known
    k = at - nodes[-1]
    return known[0] + known[1] * k + known[2] * k * k / 2


@pytest.mark.parametrize("gaps", [(1, 1), (3, 3), (2, 5), (6, 1)])
def test_order_2_goes_through_a_parabola_where_the_published_one_does_not(gaps):
    """The slope from one side misses by half a gap of curvature, k (g1) / 2 * y'' at even gaps."""

    def parabola(t):
        return 0.5 * t * t - 3 * t + 7

    nodes = [0, gaps[0], gaps[0] + gaps[1]]
    at = nodes[-1] + 2
    steps = [Step(n, 40, 0.0) for n in reversed(nodes)]
    weights = Taylor(2).weights(Step(at, 40, 0.0), steps)
    ours = sum(w * parabola(s.index) for w, s in zip(weights, steps, strict=True))
    assert ours == pytest.approx(parabola(at), abs=1e-9)
    theirs = published_forecast(2, nodes, [parabola(t) for t in nodes], at)
    assert abs(theirs - parabola(at)) > 0.5
    if gaps[0] == gaps[1]:
        assert parabola(at) - theirs == pytest.approx(2 * gaps[1] / 2)


# Where they do not apply.


@pytest.mark.parametrize("name", ["fora", "pab", "taylor_seer", "faster_cache"])
def test_a_model_without_sub_layers_is_refused(name):
    with pytest.raises(PlanError, match="no 'attn' sub-layer was found"):
        blockcache.enable(UNet(), name, scheduler=Scheduler(20))


def test_a_missing_cross_attention_is_not_worth_a_warning(caplog, build_tiny):
    """Of several kinds of sub-layers a model may lack one; a rule on its own still says so."""
    tiny = build_tiny("dit")
    with blockcache.enabled(tiny.pipe, "fora"):
        tiny.generate(4)
    assert "left out" not in caplog.text
    rule = blockcache.Rule(blockcache.Site("cross"), recipes.fora().rules[0].policy)
    with blockcache.enabled(tiny.pipe, blockcache.Recipe((rule,))):
        tiny.generate(4)
    assert "no 'cross' sub-layer was called" in caplog.text
