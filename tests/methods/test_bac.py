"""BAC's schedules against its rule written out from raw features, with every path tried."""

from itertools import combinations

import numpy as np
import pytest

from blockcache.errors import PlanError
from blockcache.methods.bac import bac
from blockcache.plan import MaskTable
from blockcache.plan.trace import Place, SiteTrace, Trace

PROMPTS, STEPS, BLOCKS = 2, 9, 3
KINDS = ("attn", "cross", "mlp")


def walks(seed, scale=1.0):
    """Features `[P, T, 5]` that drift unevenly over the steps."""
    random = np.random.default_rng(seed)
    pace = random.choice([0.05, 0.3, 1.0], (1, STEPS, 1))
    drift = np.cumsum(pace * random.normal(size=(PROMPTS, STEPS, 5)), axis=1)
    return scale * (drift + random.normal(size=(PROMPTS, 1, 5)))


@pytest.fixture
def features():
    """By block and kind; the sizes differ so that the order of the changes is no tie."""
    return {
        (block, kind): walks(10 * block + k, scale=1 + (block * 5 + k * 3) % 7)
        for block in range(BLOCKS)
        for k, kind in enumerate(KINDS)
    }


def trace_of(features):
    return Trace.of(
        {Place(kind, b, "output", "0"): SiteTrace.of(y) for (b, kind), y in features.items()}
    )


def worth(y, i, k, metric):
    """What it is worth to reuse at step k the features of step i; straight from the definition."""
    if metric == "cosine":
        return np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in y[:, [i, k]]])
    power = {"l1": 1, "mse": 2}[metric]
    return -np.mean([np.mean(np.abs(a - b) ** power) for a, b in y[:, [i, k]]])


def best_steps(y, updates, metric):
    """Of all choices of update steps the one whose reuse is worth most."""

    def total(chosen):
        last = {k: max(i for i in chosen if i <= k) for k in range(STEPS)}
        return sum(worth(y, last[k], k, metric) for k in range(STEPS) if k not in chosen)

    return max(((0, *rest) for rest in combinations(range(1, STEPS), updates - 1)), key=total)


def by_hand(features, updates, bubbles, metric="cosine"):
    """The paper's two algorithms in plain loops: computed steps by (block, kind)."""
    rows = {unit: set(best_steps(y, updates, metric)) for unit, y in features.items()}
    errors = {
        unit: np.mean(
            [np.abs(p[i] - p[j]).sum() for p in y for i in range(STEPS) for j in range(STEPS)]
        )
        for unit, y in features.items()
    }
    order = sorted(features, key=lambda unit: (unit[0], KINDS.index(unit[1])))
    for upstream in sorted(errors, key=errors.get, reverse=True)[:bubbles]:
        for downstream in order[order.index(upstream) + 1 :]:
            if downstream[1] == "mlp":
                rows[upstream] = rows[upstream] | rows[downstream]
    return rows


def rows_of(recipe):
    return {
        (block, rule.site.scope): set(row)
        for rule in recipe.rules
        for block, row in enumerate(rule.policy.computed)
    }


@pytest.mark.parametrize("metric", ["cosine", "l1", "mse"])
@pytest.mark.parametrize("updates", [1, 2, 4])
def test_schedules_without_bubbling(features, metric, updates):
    recipe = bac(trace_of(features), updates, bubbles=0, metric=metric)
    assert rows_of(recipe) == by_hand(features, updates, 0, metric)
    assert all(len(row) == updates for row in rows_of(recipe).values())


@pytest.mark.parametrize("bubbles", [1, 3, 9])
def test_schedules_with_bubbling(features, bubbles):
    made = rows_of(bac(trace_of(features), 3, bubbles))
    assert made == by_hand(features, 3, bubbles)
    assert sum(map(len, made.values())) > 3 * len(made)


def test_recipe(features):
    recipe = bac(trace_of(features), 3, 1)
    assert recipe.is_static() and recipe.name == "bac 3+1"
    assert [rule.site.scope for rule in recipe.rules] == list(KINDS)
    for rule in recipe.rules:
        assert rule.payload == "output"
        assert isinstance(rule.policy, MaskTable)
        assert rule.policy.sigmas == trace_of(features).sigmas


def test_a_model_without_cross_attention(features):
    some = {unit: y for unit, y in features.items() if unit[1] != "cross"}
    recipe = bac(trace_of(some), 3, 2)
    assert [rule.site.scope for rule in recipe.rules] == ["attn", "mlp"]
    assert rows_of(recipe) == by_hand(some, 3, 2)


def test_errors(features):
    trace = trace_of(features)
    with pytest.raises(PlanError, match="this one has nothing"):
        bac(trace_of({}))
    with pytest.raises(PlanError, match="cannot compute 10 steps of a run of 9"):
        bac(trace, updates=10)
    with pytest.raises(PlanError, match=r"bubbles must lie in 0\.\.9"):
        bac(trace, updates=2, bubbles=10)
    with pytest.raises(PlanError, match="unknown metric 'l2'"):
        bac(trace, metric="l2")
