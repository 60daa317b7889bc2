"""The axes of the search: what recipe a shape makes of a mask, and that real runs choose."""

from types import SimpleNamespace

import pytest

from blockcache import api
from blockcache.plan import Corrector, MaskTable, Rule, Site, Taylor
from blockcache.tuning.search import Found
from blockcache.tuning.shapes import AXES, SUB_LAYERS, Shape, thinned
from blockcache.tuning.tune import _Tuner, tune

SIGMAS = tuple(1 - i / 10 for i in range(10))
COMPUTED = (0, 1, 2, 4, 6, 8)
TABLE = MaskTable((COMPUTED,), 10, SIGMAS)


def test_the_plain_shape_extrapolates_the_residual_of_the_stack():
    recipe = Shape().recipe(COMPUTED, SIGMAS)
    assert recipe.rules == (Rule(Site("stack"), TABLE, Taylor(1)),) and recipe.sparse is None
    assert recipe.name == "tuned 6/10" and Shape().name == "residual of the stack"


@pytest.mark.parametrize(
    ("guidance", "expected"), [("half", (0, 2, 6)), ("late half", (0, 1, 2, 4, 8))]
)
def test_a_second_branch_that_is_computed_more_rarely(guidance, expected):
    assert thinned(COMPUTED, 10, guidance) == expected
    first, second = Shape(guidance=guidance).recipe(COMPUTED, SIGMAS).rules
    assert first == Rule(Site("stack"), TABLE, Taylor(1), branch=0)
    rarely = MaskTable((expected,), 10, SIGMAS)
    assert second == Rule(Site("model"), rarely, Taylor(1), payload="output", branch=1)


def test_the_variants_of_each_axis():
    def names(axis, branches=1, sub_layers=False, shape=Shape()):  # noqa: B008
        return [variant.name for variant in shape.variants(axis, branches, sub_layers)]

    assert names("payload") == ["output of the stack", "output of the model"]
    corrected = Shape.first(is_euler=True)
    assert corrected.name == "output of the model, corrected"
    assert names("payload", shape=corrected) == ["residual of the stack", "output of the stack"]
    assert names("forecast", shape=corrected) == [
        "output of the model, order 2, corrected",
        "output of the model, fading, corrected",
        "output of the model",
    ]
    assert names("forecast", shape=Shape.first(is_euler=False)) == [
        "residual of the stack, order 2",
        "residual of the stack, fading",
    ]
    assert names("site") == [
        "residual of all but the first block",
        "residual of all but the last block",
    ]
    assert names("site", sub_layers=True)[-1] == "outputs of attentions and MLPs"
    assert names("site", shape=Shape(Site("model"), "output")) == []
    assert names("guidance") == [] and len(names("guidance", branches=2)) == 2
    assert all("attention by" in name for name in names("attention"))
    scopes = [rule.site.scope for rule in Shape(SUB_LAYERS, "output").recipe((0,), SIGMAS).rules]
    assert scopes == ["attn", "cross", "mlp"]


def test_a_corrected_shape_corrects_both_branches():
    shape = Shape(Site("model"), "output", 2, corrector=Corrector(), guidance="half")
    first, second = shape.recipe(COMPUTED, SIGMAS).rules
    assert first.predictor == second.predictor == Taylor(2)
    assert first.corrector == second.corrector == Corrector()
    assert shape.takes_as_long_as(Shape(Site("model"), guidance="half"))
    assert not shape.takes_as_long_as(Shape(guidance="half"))


@pytest.mark.parametrize(("slower_s", "steps"), [(0.0, 6), (0.025, 4), (-0.025, 8), (9.0, 3)])
def test_what_costs_more_per_step_computes_fewer(slower_s, steps):
    """A step costs 10 ms more when it is computed; masks grow and shrink by their last step."""
    tuner = _Tuner.__new__(_Tuner)
    tuner.trace = SimpleNamespace(milliseconds={"computed": 12.0, "reused": 2.0}, sigmas=SIGMAS)
    tuner.screen, tuner.calibration = SimpleNamespace(total=10), []
    tuner.search = SimpleNamespace(
        shorter=lambda mask: mask[:-1], longer=lambda mask: (*mask, len(mask) + 1)
    )
    seen = []
    tuner.scorer = SimpleNamespace(beats=lambda recipe, *_: seen.append(recipe))
    tuner._slower_by = lambda *_: slower_s
    found = Found("here", (0, 1, 2, 3, 4, 5), ())
    assert tuner._in_the_same_time(found, Shape(Site("span", 1)), found) is None
    assert seen[0].name == f"tuned {steps}/10"


def call_of(tiny):
    kwargs = {k: v for k, v in tiny.kwargs.items() if k != "prompt"}
    return {**kwargs, "num_inference_steps": 8}


@pytest.mark.slow
def test_every_axis_is_tried_in_a_full_search(build_tiny, monkeypatch):
    """On a model of two branches with sub-layers; attention is too short to be thinned out."""
    wan = build_tiny("wan", layers=2)
    seen = []
    enabled = api.enabled

    def spy(pipe, recipe, **more):
        seen.append(recipe)
        return enabled(pipe, recipe, **more)

    monkeypatch.setattr(api, "enabled", spy)
    monkeypatch.setattr("blockcache.tuning.tune._PASSES", {"full": 1e6})
    prompts = [f"{word} over the snow" for word in ("a fox", "two birds", "smoke")]
    plan = tune(wan.pipe, prompts, psnr=25, sub_layers=True, **call_of(wan))
    assert plan.reached["met"] in (0, 1) and "reused:" in plan.note
    sites = {rule.site for recipe in seen for rule in recipe.rules}
    assert {Site("stack"), Site("model"), Site("attn"), Site("mlp")} <= sites
    assert any(rule.branch == 1 for recipe in seen for rule in recipe.rules)
    assert any(recipe.sparse is not None for recipe in seen)
    # Two tensors of the model's width per branch, or what was asked for.
    assert all(rule.predictor.depth <= 2 for rule in plan.recipe.rules)
    assert set(AXES["quick"]) < set(AXES["full"])
