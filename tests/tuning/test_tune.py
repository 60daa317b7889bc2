import logging
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from blockcache import api
from blockcache.engine.hooks import attachment_of
from blockcache.errors import BlockCacheError
from blockcache.plan import Every, Plan, Recipe, Rule, Site
from blockcache.tuning import quality
from blockcache.tuning.compare import Arm
from blockcache.tuning.goal import Goal
from blockcache.tuning.scoring import Exhausted, Ledger
from blockcache.tuning.search import Found, Search
from blockcache.tuning.tune import (
    _PASSES,
    _TIMED_RUNS,
    _Tuner,
    check_is_possible,
    split,
    tune,
)

PROMPTS = [f"a {colour} robot in the {place}" for colour in ("red", "blue") for place in "abc"]


def call_of(tiny, steps=10, **changes):
    kwargs = {k: v for k, v in tiny.kwargs.items() if k not in ("prompt", "class_labels")}
    return {**kwargs, "num_inference_steps": steps, **changes}


@pytest.fixture(autouse=True)
def time_decides_nothing(monkeypatch):
    """On models this small measured times are noise, and would decide what is found."""
    monkeypatch.setattr(_Tuner, "_timed_against", lambda *_: 0.0)
    monkeypatch.setitem(_PASSES, "quick", 1e4)


@pytest.fixture
def flux(build_tiny):
    return build_tiny("flux", layers=2)


def render(tiny, item, **call):
    prompt, seed = item
    generator = torch.Generator().manual_seed(seed)
    call = {**call_of(tiny), **call}
    return tiny.pipe(prompt=prompt, generator=generator, output_type="np", **call)[0][0]


def check_items():
    """What the check works on: four prompts, and two of them with other seeds."""
    items = [(prompt, seed) for seed, prompt in enumerate(PROMPTS)][2:]
    return [*items, (PROMPTS[2], 6), (PROMPTS[3], 7)]


def test_the_figures_of_a_plan_are_those_of_prompts_that_were_not_searched_on(flux):
    before = render(flux, check_items()[0])
    plan = tune(flux.pipe, PROMPTS, psnr=40, effort="quick", **call_of(flux))
    assert attachment_of(flux.denoiser) is None
    assert np.array_equal(render(flux, check_items()[0]), before)
    plain = [render(flux, item) for item in check_items()]
    with api.enabled(flux.pipe, plan):
        cached = [render(flux, item) for item in check_items()]
    figures = [quality.psnr(a, b) for a, b in zip(cached, plain, strict=True)]
    reached = plan.reached
    assert reached["met"] == 1 and reached["checked"] == 6 and reached["calibrated"] == 2
    assert reached["psnr_db_median"] == pytest.approx(np.median(figures), abs=1e-6)
    assert reached["psnr_db_worst"] == pytest.approx(min(figures), abs=1e-6)
    # Six of six, or the share could not be believed.
    assert min(figures) >= 40
    computed = plan.recipe.rules[0].policy.computed[0]
    assert len(computed) < 10 and f"{len(computed)} of 10 steps computed" in plan.note
    assert plan.total == 10 and reached["determinism_floor_db"] == quality.CAP_DB
    assert Plan.from_json(plan.to_json()) == plan


def test_a_lower_goal_is_reached_with_fewer_steps(flux):
    goals = [
        tune(flux.pipe, PROMPTS, psnr=psnr, effort="quick", **call_of(flux)) for psnr in (25, 80)
    ]
    cheap, dear = (len(plan.recipe.rules[0].policy.computed[0]) for plan in goals)
    assert cheap < dear and goals[0].reached["met"] == 1


def test_a_goal_that_no_plan_reaches_gives_the_closest_marked(flux, caplog):
    with caplog.at_level(logging.WARNING, "blockcache"):
        plan = tune(flux.pipe, PROMPTS, psnr=89.9, effort="quick", **call_of(flux))
    assert plan.reached["met"] == 0 and plan.reached["margin"] < 0
    assert "NOT MET, this is the closest (the goal does not hold on other prompts)" in plan.note
    assert "NOT MET" in caplog.text


def test_a_speed_is_reached_or_refused(build_tiny):
    wide = build_tiny("flux", layers=6)
    plan = tune(wide.pipe, PROMPTS[:3], speedup=1.3, effort="quick", **call_of(wide))
    assert plan.reached["target_speedup"] == 1.3 and "psnr_db_median" in plan.reached
    assert plan.reached["met"] == (plan.reached["speedup"] >= 1.3)
    with pytest.raises(BlockCacheError, match=r"49x cannot be reached .* allow .*x at most"):
        tune(wide.pipe, PROMPTS[:3], speedup=49, effort="quick", **call_of(wide))


def test_a_figure_of_ones_own(flux):
    def nearness(picture, reference):
        return -float(np.abs(picture - reference).max())

    plan = tune(flux.pipe, PROMPTS, metric=(nearness, -0.05), effort="quick", **call_of(flux))
    assert plan.reached["met"] == 1 and plan.reached["metric_worst"] >= -0.05


def stop_after(runs, kind):
    seen = []

    def on_progress(progress):
        seen.append(progress)
        if len(seen) >= runs:
            raise kind

    return on_progress, seen


def test_ctrl_c_gives_the_best_so_far(flux):
    stop, seen = stop_after(30, KeyboardInterrupt)
    plan = tune(flux.pipe, PROMPTS, psnr=60, on_progress=stop, **call_of(flux))
    assert attachment_of(flux.denoiser) is None
    assert plan.reached["met"] == 0 and "interrupted before it could be checked" in plan.note
    assert "checked" not in plan.reached and plan.recipe.rules[0].policy.total == 10
    assert seen[-1].runs > seen[0].runs >= 0 and seen[-1].most_runs <= 200


def test_ctrl_c_before_anything_was_found_is_ctrl_c(flux):
    stop, _ = stop_after(1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        tune(flux.pipe, PROMPTS, psnr=40, on_progress=stop, **call_of(flux))
    assert attachment_of(flux.denoiser) is None


def test_an_interrupted_tuning_goes_on_where_it_was(flux, tmp_path):
    stop, _ = stop_after(30, KeyboardInterrupt)
    ask = dict(psnr=50, effort="quick", work=tmp_path, **call_of(flux))
    tune(flux.pipe, PROMPTS, on_progress=stop, **ask)
    rows = (tmp_path / "runs.jsonl").read_text().splitlines()
    resumed = tune(flux.pipe, PROMPTS, **ask)
    after = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert after[: len(rows)] == rows and len(set(after)) == len(after)
    again = tune(flux.pipe, PROMPTS, **ask)
    assert again.recipe == resumed.recipe
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == after


def test_a_limit_on_runs_is_kept(flux, monkeypatch):
    def charge(ledger, seconds, is_uncached=False):
        """Each run counts as one, however long it took."""
        if is_uncached:
            ledger.learn(seconds)
        ledger.runs += 1
        ledger.note(ledger)

    monkeypatch.setattr(Ledger, "charge", charge)
    seen = []
    tune(flux.pipe, PROMPTS, psnr=60, max_runs=20, on_progress=seen.append, **call_of(flux))
    # The first one beyond is seen before the next, and timing the answer is not given up.
    assert 20 < seen[-1].runs <= 20 + 1 + 2 * _TIMED_RUNS
    with pytest.raises(BlockCacheError, match="before anything was found; allow more"):
        tune(flux.pipe, PROMPTS, psnr=60, max_runs=1, **call_of(flux))


@pytest.mark.parametrize(
    ("first", "holds", "answer"),
    [
        (8, {8: 15, 7: 13, 6: 11}, 7),
        (8, {8: 12, 7: 11}, 8),
        (4, {4: 12, 3: 12}, 3),
        # Up by two, by four, for looks are few; down by half of that, which costs nothing.
        (6, {6: 3, 8: 14, 7: 12}, 7),
        (6, {6: 3, 8: 4, 12: 16, 10: 13, 9: 12}, 10),
    ],
)
def test_from_a_plan_that_holds_the_check_goes_on_to_faster_ones(first, holds, answer):
    """`holds`: of 16 pictures, by the number of steps; twelve convince at the first two looks."""
    tuner, looked_at = _Tuner.__new__(_Tuner), []

    def figures(steps, *_):
        looked_at.append(steps)
        return holds[steps] * [50.0] + (16 - holds[steps]) * [39.0]

    tuner.goal = Goal("psnr_db", 40.0, quality.psnr)
    tuner.confidence, tuner.effort, tuner.check = 0.9, "quick", list(range(16))
    tuner.ledger, tuner._prompts = Ledger(most_runs=100.0), 8
    tuner.screen, tuner.search = SimpleNamespace(total=50), Search(None, None, [], None)
    tuner.search.shorter = lambda mask: mask[:-1]
    tuner.search.longer = lambda mask: (*mask, len(mask))
    tuner._recipe_of = lambda found: len(found.computed)
    tuner.scorer = SimpleNamespace(
        figures=figures,
        reach=lambda steps, items, goal, bar: sum(map(goal.reaches, figures(steps))) >= bar,
    )
    tuner._check([Found("here", tuple(range(first)), ())])
    assert set(looked_at) == set(holds)
    assert tuner.best.is_met and len(tuner.best.found.computed) == answer
    assert sum(map(tuner.goal.reaches, tuner.best.figures)) == holds[answer] >= 12
    assert tuner.ledger.reserved == 0


def test_rivals_that_do_as_well_are_named(flux, monkeypatch):
    def rivals(trial):
        everything = Recipe((Rule(Site(), Every(1)),))
        return (
            Arm("two steps", 2),
            Arm("all computed", 10, lambda: api.enabled(trial.pipe, everything)),
            Arm("impossible", 10, objection="it is not there"),
        )

    # However slow: what is asked here is whether the nearer one is named.
    monkeypatch.setattr("blockcache.tuning.tune._SPEED_MARGIN", 1000.0)
    plan = tune(flux.pipe, PROMPTS, psnr=40, rivals=rivals, **call_of(flux))
    assert "rival all computed (10 steps) is as fast and nearer: 100 against" in plan.note
    assert "two steps" not in plan.note and "impossible" not in plan.note


def test_rivals_that_would_go_beyond_the_limit_are_left_out(flux, monkeypatch):
    asked = []

    def check(ledger, more_runs=0.0):
        asked.append(more_runs)
        if more_runs > 1:
            raise Exhausted("enough")

    monkeypatch.setattr("blockcache.tuning.scoring.Ledger.check", check)
    plan = tune(
        flux.pipe, PROMPTS, psnr=40, rivals=lambda trial: [Arm("never", 10)] * 8, **call_of(flux)
    )
    assert asked[-1] > 1 and "the rivals were not raced: enough" in plan.note
    assert plan.reached["met"] == 1 and plan.reached["speedup"] > 0


def test_a_pipeline_that_does_not_repeat_itself_is_refused(flux, monkeypatch, caplog):
    decode, noise = flux.pipe.vae.decode, torch.Generator().manual_seed(0)

    def noisy(*args, **kwargs):
        found = decode(*args, **kwargs)
        return (found[0] + 0.05 * torch.randn(found[0].shape, generator=noise), *found[1:])

    monkeypatch.setattr(flux.pipe.vae, "decode", noisy)
    with pytest.raises(BlockCacheError, match="two uncached runs of one seed are .* dB apart"):
        tune(flux.pipe, PROMPTS, psnr=60, effort="quick", **call_of(flux))
    with caplog.at_level(logging.WARNING, "blockcache"):
        plan = tune(flux.pipe, PROMPTS, psnr=20, effort="quick", **call_of(flux))
    assert "dB apart" in caplog.text and plan.reached["determinism_floor_db"] < 45


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"psnr": math.nan}, "psnr must lie in"),
        ({}, "give one goal"),
        ({"psnr": 30, "confidence": 1.0}, "confidence must lie between"),
        ({"psnr": 30, "effort": "hard"}, "effort must be one of full, quick"),
        ({"psnr": 30, "num_inference_steps": 4}, "4 steps leaves nothing to tune"),
        ({"psnr": 30, "generator": None}, "tune.. sets generator"),
        ({"psnr": 30, "colour": 1}, "takes no colour"),
        ({"psnr": 30, "seeds": [1]}, "6 prompts but 1 seeds"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_run(flux, asked, message, monkeypatch):
    monkeypatch.setattr(type(flux.pipe), "encode_prompt", None)
    with pytest.raises(BlockCacheError, match=message):
        tune(flux.pipe, PROMPTS, **{**call_of(flux), **asked})


def items(*prompts):
    return [(prompt, seed) for seed, prompt in enumerate(prompts)]


def test_a_third_is_searched_on_and_twice_as_many_check():
    calibration, check = split(items(*map(str, range(30))), 6)
    assert [p for p, _ in calibration] == list(map(str, range(8)))
    assert [p for p, _ in check] == list(map(str, range(8, 24)))
    assert not set(calibration) & set(check)


def test_few_prompts_check_with_other_seeds():
    calibration, check = split(items("a", "b", "c", "d"), least=6)
    assert calibration == [("a", 0)]
    assert check == [("b", 1), ("c", 2), ("d", 3), ("b", 4), ("c", 5), ("d", 6)]
    calibration, check = split(items("a", "b"), least=2)
    assert calibration == [("a", 0)] and check == [("b", 1), ("b", 2)]


def test_repeated_prompts_and_one_prompt_are_said(caplog):
    with caplog.at_level(logging.WARNING, "blockcache"):
        split(items("a", "b", "a", "c"), 6)
    assert "1 prompts are in the calibration and in the check" in caplog.text
    with caplog.at_level(logging.WARNING, "blockcache"):
        calibration, check = split(items("only"), least=2)
    assert "one prompt only" in caplog.text
    assert calibration == [("only", 0)] and check == [("only", 1), ("only", 2)]


def test_one_picture_is_not_counted_six_times(caplog):
    with caplog.at_level(logging.WARNING, "blockcache"):
        _, check = split([("a", 0), ("b", 0), ("c", 0), *[("d", 0)] * 6], 6)
    assert len(set(check)) == len(check) == 6 and ("d", 0) in check
    assert "6 pictures are checked with 1 prompts" in caplog.text


@pytest.mark.parametrize(
    ("asked", "is_possible"),
    [
        (("quick", 8, 12, 0.5, 0.9), True),
        (("quick", 8, 37, 0.9, 0.9), False),
        (("full", 8, 37, 0.9, 0.9), True),
        (("full", 8, 379, 0.99, 0.9), False),
    ],
)
def test_what_no_check_can_show_for_the_cost_is_refused(asked, is_possible, monkeypatch):
    monkeypatch.setitem(_PASSES, "quick", 7.5)
    expected = nullcontext() if is_possible else pytest.raises(BlockCacheError, match="to check")
    with expected:
        check_is_possible(*asked)
