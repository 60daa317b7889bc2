"""The registry of methods and the recipes they make."""

import inspect

import pytest

import blockcache
from blockcache import PlanError, recipes
from blockcache.methods.presets import BUDGETS, preset
from blockcache.plan import (
    Cooldown,
    Every,
    Gate,
    Geometric,
    MaxStreak,
    Recipe,
    Rule,
    Site,
    Taylor,
    Warmup,
)
from blockcache.plan.spec import from_json, to_json
from toys import Denoiser, Scheduler, calls, drive

READY = [name for name in recipes.names() if not recipes.needs(name)]
# The toy is a bare chain of blocks: no sub-layers, no time embedding, no U-Net.
ON_A_CHAIN = [
    name
    for name in READY
    if {rule.site.scope for rule in recipes.by_name(name).rules} <= {"stack", "span", "block"}
    and name not in ("tea_cache", "sea_cache")
]


def test_every():
    expected = Rule(Site("stack"), Every(4), Taylor(1))
    assert recipes.every(4, order=1) == Recipe((expected,), name="every 4")


def test_geometric():
    expected = Rule(Site("stack"), Geometric(0.25), Taylor(2), (Cooldown(3),))
    assert recipes.geometric(0.25, order=2, cooldown=3) == Recipe(
        (expected,), name="geometric 0.25"
    )
    assert recipes.geometric().rules[0].guards == ()


def test_first_block():
    guards = (Warmup(4), Cooldown(1), MaxStreak(3))
    expected = Rule(Site("span", 1), Gate(0.12), Taylor(1), guards)
    made = recipes.first_block(0.12, warmup=4, cooldown=1, max_streak=3, order=1)
    assert made == Recipe((expected,), name="first_block 0.12")


@pytest.mark.parametrize("word", BUDGETS)
def test_presets(word):
    assert preset(word) == Recipe(recipes.corrected(BUDGETS[word]).rules, name=word)
    assert preset(word).is_static()


def test_a_smaller_budget_is_a_faster_word():
    assert BUDGETS["quality"] > BUDGETS["balanced"] > BUDGETS["fast"] > 0


def test_the_registry_knows_every_method_and_nothing_else():
    assert {"every", "first_block", "geometric"} <= set(recipes.names())
    assert "presets" not in recipes.names()
    for name in recipes.names():
        assert getattr(recipes, name) is recipes.function(name)
        assert recipes.function(name).__name__ == name


@pytest.mark.parametrize("name", READY)
def test_every_method_survives_json(name):
    recipe = recipes.by_name(name)
    assert recipe == recipes.function(name)()
    assert from_json(to_json(recipe)) == recipe


@pytest.mark.parametrize("name", recipes.names())
def test_every_method_says_its_settings(name):
    function = recipes.function(name)
    documented = inspect.getdoc(function)
    for setting in inspect.signature(function).parameters:
        assert f"{setting}:" in documented or f"{setting}," in documented, setting


@pytest.mark.parametrize("name", ON_A_CHAIN)
def test_every_method_skips_work_on_a_toy_that_stands_still(name):
    """With an input that does not change any reuse is exact, and every method must reuse.

    But for Spectrum's: its ridge pulls the fit of a constant towards zero, as published.
    """
    model = Denoiser()
    scheduler = Scheduler(20)
    blockcache.enable(model, name, scheduler=scheduler)
    outputs = drive(model, scheduler, [1.0] * 20)
    if name != "spectrum":
        assert outputs == pytest.approx([42.0] * 20, rel=1e-5)
    assert min(calls(model)) <= 15


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("evry", {}, "unknown recipe 'evry'.*every"),
        ("presets", {}, "unknown recipe"),
        ("__init__", {}, "unknown recipe"),
        ("every", {"m": 2}, "every"),
        ("every", {"n": 0}, "n"),
        ("every", {"n": "2"}, "n"),
        ("geometric", {"budget": 1.5}, "budget"),
        ("first_block", {"threshold": -1.0}, "threshold"),
        ("first_block", {"max_streak": 0}, "steps"),
    ],
)
def test_wrong_names_and_settings(name, settings, word):
    with pytest.raises(PlanError, match=word):
        recipes.by_name(name, **settings)


def test_an_unknown_attribute_names_the_known_recipes():
    with pytest.raises(AttributeError, match="no recipe 'teacash'.*first_block"):
        _ = recipes.teacash
