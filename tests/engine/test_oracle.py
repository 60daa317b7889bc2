"""The engine against a second implementation: twenty lines on plain numbers that store everything.

Random recipes of static rules, over and inside one another, on a chain of blocks.
"""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.plan import Cooldown, Copy, MaskTable, MaxStreak, Taylor, Warmup, even_steps
from toys import Block, Denoiser, Scheduler, calls

STEPS = 7
BLOCKS = 5


class Chain(Denoiser):
    """x -> x / 2 + c: binary fractions, so sums are exact."""

    def __init__(self):
        super().__init__(0)
        self.blocks = torch.nn.ModuleList(Block(i + 1.0, factor=0.5) for i in range(BLOCKS))


class Unit:
    def __init__(self, rule, lo, hi, wanted):
        self.rule, self.lo, self.hi, self.wanted = rule, lo, hi, wanted
        self.history = []

    def contains(self, other):
        return self.lo <= other.lo and other.hi <= self.hi

    def apart(self, other):
        return self.hi <= other.lo or other.hi <= self.lo


def units_of(recipe):
    found = []
    for rule in recipe.rules:
        lo, hi = rule.site.limits(BLOCKS)
        pieces = [(i, i + 1) for i in range(lo, hi)] if rule.site.scope == "block" else [(lo, hi)]
        rows = rule.schedule(even_steps(STEPS), len(pieces))
        found += [Unit(rule, a, b, row) for (a, b), row in zip(pieces, rows, strict=True)]
    return found


def expected(recipe, inputs):
    """Outputs, and how often each block is called."""
    units, outputs, called = units_of(recipe), [], [0] * BLOCKS
    for step, x in enumerate(inputs):
        reused = []
        for unit in units if step else ():
            # Rules are tried in order; one that would cut into an earlier one's reuse is computed.
            fits = all(u.apart(unit) or u.contains(unit) or unit.contains(u) for u in reused)
            if not unit.wanted[step] and fits:
                reused.append(unit)
        entered = {}
        i = 0
        while i < BLOCKS:
            for unit in units:
                if unit.lo == i:
                    entered[unit] = x
            over = [u for u in reused if u.lo <= i < u.hi]
            if over:
                unit = max(over, key=lambda u: u.hi - u.lo)
                x = predicted(unit, step, x)
                i = unit.hi
            else:
                called[i] += 1
                x = 0.5 * x + i + 1
                i += 1
            for unit in units:
                whole = all(u.apart(unit) or unit.contains(u) for u in reused)
                if unit.hi == i and unit not in reused and whole:
                    residual = unit.rule.payload == "residual"
                    unit.history.insert(0, (step, x - entered[unit] if residual else x))
        outputs.append(x)
    return outputs, called


def predicted(unit, step, x):
    depth = unit.rule.predictor.depth
    nodes = unit.history[:depth]
    total = x if unit.rule.payload == "residual" else 0.0
    for j, (node, value) in enumerate(nodes):
        weight = 1.0
        for k, (other, _) in enumerate(nodes):
            if k != j:
                weight *= (step - other) / (node - other)
        total += weight * value
    return total


def site(lo, length, kind):
    hi = min(BLOCKS, lo + length)
    if kind == "stack" or (lo, hi) == (0, BLOCKS) and kind == "span":
        return Site("stack")
    return Site(kind, lo, hi)


SITES = st.builds(
    site,
    st.integers(0, BLOCKS - 1),
    st.integers(1, BLOCKS),
    st.sampled_from(["span", "span", "block", "stack"]),
)
TABLES = st.sets(st.integers(1, STEPS - 1)).map(
    lambda steps: MaskTable((tuple(sorted(steps | {0})),), STEPS)
)
RULES = st.builds(
    Rule,
    SITES,
    TABLES,
    st.sampled_from([Copy(), Taylor(1), Taylor(2)]),
    st.sampled_from([(), (Warmup(2),), (MaxStreak(1),), (Cooldown(1), MaxStreak(2))]),
    st.sampled_from(["residual", "output"]),
)


def rule(lo, hi, *computed):
    return Rule(site(lo, hi - lo, "span"), MaskTable((computed,), STEPS))


@settings(max_examples=150, deadline=None)
@given(
    rules=st.lists(RULES, min_size=1, max_size=4),
    inputs=st.lists(st.integers(-8, 8), min_size=STEPS, max_size=STEPS),
)
# Neither contains the other and both are reused: the blocks that only one covers were passed by.
@example(rules=[rule(0, 3, 0), rule(1, 4, 0)], inputs=list(range(STEPS)))
@example(rules=[rule(0, 2, 0), rule(1, 4, 0)], inputs=list(range(STEPS)))
@example(rules=[rule(1, 4, 0, 2), rule(0, 2, 0, 3), rule(2, 5, 0)], inputs=list(range(STEPS)))
def test_random_recipes(rules, inputs):
    recipe = Recipe(tuple(rules))
    model, scheduler = Chain(), Scheduler(STEPS)
    blockcache.enable(model, recipe, scheduler=scheduler)
    outputs = []
    with torch.no_grad():
        for i, x in enumerate(inputs):
            scheduler.step_index = i
            value = torch.full((1, 1, 1), float(x), dtype=torch.float64)
            outputs.append(model(value, scheduler.timesteps[i]).item())
    wanted, called = expected(recipe, inputs)
    assert torch.allclose(torch.tensor(outputs), torch.tensor(wanted), rtol=1e-9, atol=1e-9)
    assert calls(model) == called
    blockcache.disable(model)
    assert model._compiled_call_impl is None
