"""What users call: words, names, files, errors, warnings, the summary."""

import json
import logging
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import blockcache
from blockcache import (
    BlockCacheError,
    PlanError,
    PlanMismatchError,
    Recipe,
    Rule,
    Site,
    UnsupportedModelError,
    recipes,
)
from blockcache.methods.presets import BUDGETS
from blockcache.plan import Copy, Every, Gate, MaskTable, Taylor
from toys import Denoiser, Scheduler, branches, calls, drive, enable, static

STEPS = 8


def run(tiny, steps=STEPS, **changes):
    return torch.as_tensor(tiny.generate(steps, latent=True, **changes))


def computed_steps(target):
    """The steps at which everything was computed, of each branch."""
    found = blockcache.summary(target).as_dict()["branches"]
    return [[i for i, row in enumerate(b["map"]) if all(row)] for b in found]


@pytest.fixture
def flux(build_tiny):
    return build_tiny("flux", layers=2)


# What can be enabled.


@pytest.mark.parametrize(
    ("word", "expected"),
    # Shares 0.48, 0.32 and 0.16 of 20 steps: 10, 6 and 3.
    [
        ("quality", [0, 1, 2, 4, 6, 8, 12, 15, 18, 19]),
        ("balanced", [0, 2, 4, 8, 14, 18]),
        ("fast", [0, 4, 14]),
    ],
)
def test_the_three_words(word, expected):
    model = Denoiser()
    scheduler = Scheduler(20)
    blockcache.enable(model, word, scheduler=scheduler)
    # The toy's output is linear in the step: from the second computed step on it is exact.
    outputs = drive(model, scheduler, range(20))
    first = expected[1]
    assert outputs[first:] == pytest.approx([16 * x + 26 for x in range(first, 20)], rel=1e-5)
    assert computed_steps(model) == [expected]
    assert calls(model) == [round(BUDGETS[word] * 20)] * 4


def test_balanced_is_what_one_gets_without_asking(flux):
    blockcache.enable(flux.pipe)
    assert blockcache.summary(flux.pipe).as_dict()["recipe"] == "balanced"


@pytest.mark.parametrize("name", ["every", "first_block", "fora", "easy_cache", "sortblock"])
def test_recipes_by_name(flux, name):
    blockcache.enable(flux.pipe, name)
    by_name = run(flux)
    blockcache.enable(flux.pipe, recipes.function(name)())
    assert torch.equal(run(flux), by_name)


def test_a_plan_does_what_its_recipe_does(build_tiny):
    """Also without sigmas given: a plan for n steps must fit every sampler's n steps. It was
    carried over by made-up noise levels, and computed only the first and the last step."""
    for name in ("flux", "sd15", "wan", "pixart"):
        tiny = build_tiny(name)
        blockcache.enable(tiny.pipe, "balanced")
        expected = run(tiny, 10)
        plan = blockcache.plan_for(tiny.pipe, "balanced", steps=10)
        blockcache.enable(tiny.pipe, plan)
        assert torch.equal(run(tiny, 10), expected), name
        assert {tuple(row) for row in computed_steps(tiny.pipe)} == {(0, 2, 7)}, name


def test_a_plan_from_a_file(flux, tmp_path, caplog):
    plan = blockcache.plan_for(flux.pipe, recipes.every(3), steps=STEPS)
    path = tmp_path / "plan.json"
    plan.save(path)
    for what in (plan, path, str(path)):
        blockcache.enable(flux.pipe, what)
        run(flux)
        assert computed_steps(flux.pipe) == [[0, 3, 6]]
    assert "made for" not in caplog.text
    assert json.loads(path.read_text())["fingerprint"]["sampler"] == (
        "FlowMatchEulerDiscreteScheduler"
    )


def test_plan_for_writes_down_steps_sigmas_and_model(flux):
    sigmas = [1.0, 0.8, 0.5, 0.1]
    plan = blockcache.plan_for(flux.pipe, "every", steps=4, sigmas=sigmas)
    (rule,) = plan.recipe.rules
    assert rule.policy == MaskTable(((0, 2),), 4, tuple(sigmas))
    assert (plan.total, plan.fingerprint.model, plan.fingerprint.blocks) == (
        4,
        "FluxTransformer2DModel",
        4,
    )
    assert plan.fingerprint.dtype == "float32"
    assert re.fullmatch("[0-9a-f]{16}", plan.fingerprint.config)
    assert blockcache.plan_for(flux.denoiser, plan) is plan
    assert blockcache.plan_for(flux.denoiser, "every", steps=4).fingerprint.sampler == ""


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (dict(steps=0), "at least 1"),
        (dict(steps=-3), "at least 1"),
        (dict(steps="10"), "whole number"),
        (dict(steps=10.0), "whole number"),
        (dict(what="x"), "unknown"),
    ],
)
def test_plan_for_refuses(flux, settings, word):
    with pytest.raises(PlanError, match=word):
        blockcache.plan_for(flux.pipe, **settings)


def test_plan_for_refuses_what_enable_refuses(flux, build_tiny):
    plan = blockcache.plan_for(build_tiny("wan", layers=2).pipe, "every", steps=4)
    with pytest.raises(PlanMismatchError, match="WanTransformer3DModel"):
        blockcache.plan_for(flux.pipe, plan)
    beyond = Recipe((Rule(Site("span", 0, 99), Every(2)),))
    with pytest.raises(PlanError, match="99"):
        blockcache.plan_for(flux.pipe, beyond)


def test_how_weights_are_quantised_makes_no_other_model(flux, build_tiny):
    plan = blockcache.plan_for(flux.pipe, "every", steps=STEPS)
    small = build_tiny("flux", layers=2)
    small.denoiser.register_to_config(quantization_config={"quant_method": "bitsandbytes"})
    blockcache.enable(small.pipe, plan)
    assert len(run(small)) == 1


def test_one_model_under_two_names(build_tiny):
    """A merged checkpoint in the place of both experts: hooks on hooks called each other."""
    wan = build_tiny("wan", layers=2)
    wan.pipe.register_modules(transformer_2=wan.denoiser)
    wan.pipe.register_to_config(boundary_ratio=0.5)
    before = run(wan)
    blockcache.enable(wan.pipe, "every")
    assert list(blockcache.api.attachments(wan.pipe)) == ["transformer"]
    assert not torch.equal(run(wan), before)
    blockcache.disable(wan.pipe)
    assert torch.equal(run(wan), before)


def test_plan_for_refuses_sigmas_that_do_not_match_the_steps(flux):
    with pytest.raises(PlanError, match="sigmas"):
        blockcache.plan_for(flux.pipe, "every", steps=50, sigmas=[1.0, 0.5])


def test_the_fingerprint_is_the_configs_and_not_the_weights(build_tiny):
    a, b = build_tiny("flux", layers=2), build_tiny("flux", layers=2)
    with torch.no_grad():
        b.denoiser.proj_out.weight.zero_()
    plan = blockcache.plan_for(a.pipe, "every", steps=STEPS)
    assert blockcache.plan_for(b.pipe, "every", steps=STEPS) == plan
    blockcache.enable(b.pipe, plan)
    other = blockcache.plan_for(build_tiny("flux", layers=2, heads=4).pipe, "every", steps=STEPS)
    with pytest.raises(PlanMismatchError, match="another configuration"):
        blockcache.enable(a.pipe, other)
    with pytest.raises(PlanMismatchError, match="WanTransformer3DModel.*FluxTransformer2DModel"):
        blockcache.enable(a.pipe, blockcache.plan_for(build_tiny("wan").pipe, "every", steps=STEPS))


def test_a_run_that_is_not_what_the_plan_was_made_for_is_said_once(flux, caplog):
    plan = blockcache.plan_for(flux.pipe, "every", steps=STEPS)
    size = (64, 16)
    seen = {"size": size, "adapter": "", "guidance": float(flux.kwargs.get("guidance_scale", 3.5))}
    alike = replace(plan, fingerprint=replace(plan.fingerprint, **seen))
    blockcache.enable(flux.pipe, alike)
    run(flux)
    assert blockcache.summary(flux.pipe) and "do not hold" not in caplog.text
    other = dict(seen, size=(256, 16), adapter="style 0.5", guidance=7.0, sampler="DDIMScheduler")
    blockcache.enable(flux.pipe, replace(plan, fingerprint=replace(plan.fingerprint, **other)))
    run(flux)
    run(flux)
    assert caplog.text.count("do not hold here") == 1
    for words in (
        "sampler FlowMatchEulerDiscreteScheduler instead of DDIMScheduler",
        "sample size 64x16 instead of 256x16",
        "adapter none instead of style 0.5",
        "guidance 3.5 instead of 7",
    ):
        assert words in caplog.text


# Refusals.


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("blanced", "unknown preset or recipe 'blanced'.*quality, balanced, fast.*first_block"),
        ("no/such/plan.json", "cannot read the plan"),
        ("presets", "unknown"),
        ("", "unknown"),
        (7, "got int"),
        (None, "got NoneType"),
        (["balanced"], "got list"),
        (Recipe((Rule(Site("span", 2, 9), Every(2)),)), "does not fit a model of 4 blocks"),
        (Recipe((Rule(Site("attn"), Every(2)),)), "no 'attn' sub-layer was found in blocks 0..4"),
        (Recipe((Rule(Site("stack"), Gate(0.1)),)), "needs blocks in front"),
        (
            Recipe((Rule(Site("block"), MaskTable(((0,), (0, 1)), 8)),)),
            "2 rows",
        ),
    ],
)
def test_what_cannot_be_enabled_is_refused_before_anything_changes(what, word):
    model = Denoiser()
    with pytest.raises(PlanError, match=word):
        blockcache.enable(model, what)
    assert not model._forward_pre_hooks
    assert drive(model, Scheduler(), range(3)) == [26, 42, 58]


def test_a_plan_for_a_directory(tmp_path):
    with pytest.raises(PlanError, match="a directory"):
        blockcache.enable(Denoiser(), tmp_path)


class NoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.text_refiner = nn.ModuleList([Denoiser(1).blocks[0]])
        self.projections = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x):
        return self.encoder(x)


class OneBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = Denoiser(1).blocks


def test_unknown_models_are_refused_by_name_and_with_what_was_found():
    for model in (NoBlocks(), OneBlock(), nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError) as caught:
            blockcache.enable(model)
        text = str(caught.value)
        assert type(model).__name__ in text
        assert "at least two blocks" in text
    with pytest.raises(UnsupportedModelError, match="text_refiner, projections"):
        blockcache.enable(NoBlocks())
    with pytest.raises(UnsupportedModelError, match="lists seen: none"):
        blockcache.enable(nn.Linear(2, 2))


def test_a_pipeline_without_a_denoiser_is_refused_with_its_parts():
    pipe = SimpleNamespace(components={"vae": nn.Linear(1, 1), "text_encoder": None})
    with pytest.raises(UnsupportedModelError, match="SimpleNamespace.*parts: text_encoder, vae"):
        blockcache.enable(pipe)
    with pytest.raises(UnsupportedModelError, match="none"):
        blockcache.enable("a pipeline")


def test_every_error_is_a_value_error_of_ours():
    for error in (PlanError, PlanMismatchError, UnsupportedModelError):
        assert issubclass(error, BlockCacheError)
    assert issubclass(BlockCacheError, ValueError)
    assert issubclass(PlanMismatchError, PlanError)


def test_a_transformer_in_a_loop_of_ones_own(build_tiny):
    """A pipeline's denoiser called without the pipeline, with `scheduler=`, is cached alike."""
    tiny = build_tiny("flux", layers=2)
    kept = {}

    def keep(module, args, kwargs):
        kept.setdefault("kwargs", dict(kwargs))

    handle = tiny.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    start = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    run(tiny)
    handle.remove()
    denoiser, settings = tiny.denoiser, kept["kwargs"]
    scheduler = tiny.pipe.scheduler
    del tiny

    def loop():
        scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)], mu=0.0)
        latents = start
        with torch.no_grad():
            for t in scheduler.timesteps:
                arguments = {
                    **settings,
                    "hidden_states": latents,
                    "timestep": (t / 1000).expand(1),
                }
                velocity = denoiser(**arguments)[0]
                latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents

    plain = loop()
    blockcache.enable(denoiser, recipes.every(2), scheduler=scheduler)
    cached = loop()
    assert computed_steps(denoiser) == [[0, 2, 4, 6]]
    assert torch.equal(loop(), cached)
    assert 1e-6 < ((cached - plain).norm() / plain.norm()).item() < 0.2
    blockcache.disable(denoiser)
    assert torch.equal(loop(), plain)


# What is said.


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("blockcache")]


def test_few_steps_are_remarked_on_once(caplog):
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    for _ in range(3):
        scheduler.set_timesteps(4)
        drive(model, scheduler, range(4))
    assert len(said(caplog)) == 1
    assert "a run of 4 steps leaves little to reuse" in said(caplog)[0]


def test_eight_steps_are_not_remarked_on(caplog):
    model = Denoiser()
    drive(model, enable(model, static(Site("stack"), 0, 2, total=8), steps=8), range(8))
    assert said(caplog) == []


def test_another_step_count_than_the_plans_is_said_once(caplog):
    model = Denoiser()
    scheduler = Scheduler(20)
    blockcache.enable(model, Recipe((static(Site("stack"), 0, 1, 5),)), scheduler=scheduler)
    for _ in range(2):
        scheduler.set_timesteps(20)
        drive(model, scheduler, range(20))
        assert computed_steps(model) == [[0, 2, 10]]
    assert len(said(caplog)) == 1
    assert "made for 10 steps and is applied to 20 by share of the run" in said(caplog)[0]


def test_another_noise_schedule_than_the_plans_is_said_once(caplog):
    model = Denoiser()
    scheduler = Scheduler(10)
    table = MaskTable(((0, 1, 5),), 10, tuple(1.0 - 0.05 * i for i in range(10)))
    blockcache.enable(model, Recipe((Rule(Site("stack"), table),)), scheduler=scheduler)
    drive(model, scheduler, range(10))
    # 1.0, 0.95 (nearest 1.0 by a hair or 0.9) and 0.75 among 1.0, 0.9, 0.8, 0.7, ...
    assert computed_steps(model)[0][0] == 0
    assert set(computed_steps(model)[0]) <= {0, 1, 2, 3}
    assert len(said(caplog)) == 1
    assert "by noise level" in said(caplog)[0]


def test_a_run_that_reused_nothing_is_said_once_with_the_numbers(caplog):
    model = Denoiser()
    scheduler = Scheduler(10)
    blockcache.enable(model, Recipe((Rule(Site("stack"), Every(1)),)), scheduler=scheduler)
    for _ in range(3):
        scheduler.set_timesteps(10)
        drive(model, scheduler, range(10))
    assert len(said(caplog)) == 1
    assert "reused nothing" in said(caplog)[0]


def test_importing_and_enabling_print_nothing(capsys, flux):
    blockcache.enable(flux.pipe)
    run(flux)
    blockcache.disable(flux.pipe)
    assert capsys.readouterr().out == ""


# The summary.


def test_the_summary_fits_on_one_screen_and_is_right():
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), 0, 1, 5))
    drive(model, scheduler, range(10))
    text = str(blockcache.summary(model))
    lines = text.splitlines()
    assert lines[0] == "blockcache  Denoiser  custom"
    # Residuals 26, 41, 101: changes 15 / 26 and 60 / 41; drift is the same, as copies predict.
    assert re.search(r"^0 +10 +3 +7 +0\.577 / 1\.463 / 1\.463 +5 dB$|1\.463", lines[2])
    assert "block calls skipped: 70 %" in text
    assert "reuse 70 %" in text
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 120


def test_the_figures_are_plain_data():
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), 0, 1, 5))
    drive(model, scheduler, range(10))
    figures = blockcache.summary(model).as_dict()
    assert json.loads(json.dumps(figures)) == figures
    assert figures["model"] == "Denoiser"
    assert figures["cache_bytes"] == 4
    assert figures["skipped_fraction"] == 0.7
    (branch,) = figures["branches"]
    assert branch["change"]["max"] == pytest.approx(60 / 41)
    # Only computed steps whose payload is kept are compared: step 5 with the one of step 1.
    assert branch["drift_db"] == pytest.approx(-20 * math.log10(60 / 101), abs=1e-3)


def test_a_summary_before_any_run_divides_by_nothing():
    model = Denoiser()
    enable(model, static(Site("stack"), 0))
    figures = blockcache.summary(model).as_dict()
    assert figures["skipped_fraction"] == 0
    assert figures["branches"] == []
    assert "no run yet" in str(blockcache.summary(model))


def test_a_summary_of_a_run_of_one_step():
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), 0, total=1), steps=1)
    assert drive(model, scheduler, [3.0]) == [74]
    assert branches(model)[0]["drift_db"] is None
    assert "block calls skipped: 0 %" in str(blockcache.summary(model))


def test_a_summary_of_nothing_enabled(flux):
    with pytest.raises(BlockCacheError, match="nothing is enabled here"):
        blockcache.summary(flux.pipe)
    blockcache.enable(flux.pipe)
    blockcache.disable(flux.pipe)
    with pytest.raises(BlockCacheError, match="nothing is enabled here"):
        blockcache.summary(flux.pipe)


def test_drift_of_a_perfect_prediction_is_large():
    model = Denoiser()
    rule = static(Site("stack"), *range(0, 10, 2), predictor=Taylor(1))
    drive(model, enable(model, rule), range(10))
    assert branches(model)[0]["drift_db"] >= 100
    model = Denoiser()
    rule = static(Site("stack"), *range(0, 10, 2), predictor=Copy())
    drive(model, enable(model, rule), range(10))
    # Residuals 26, 56, 86, 116, 146: relative errors 30 / 56, 30 / 86, 30 / 116 (the last payload
    # has a reuse behind it, too: 30 / 146); the median of the four, the upper one, is 30 / 86.
    expected = -20 * math.log10(30 / 86)
    assert branches(model)[0]["drift_db"] == pytest.approx(expected, abs=0.01)


def test_logging_goes_to_the_librarys_own_logger(flux, caplog):
    with caplog.at_level(logging.INFO, logger="blockcache"):
        blockcache.enable(flux.pipe, "fast")
    assert {r.name for r in caplog.records if "enabled" in r.getMessage()} == {"blockcache"}
