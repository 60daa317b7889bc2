import json
import statistics

import numpy as np
import pytest
import torch

from blockcache import api
from blockcache.engine.hooks import attachment_of
from blockcache.errors import BlockCacheError, PlanMismatchError
from blockcache.pipelines import samplers
from blockcache.plan import Every, Gate, Recipe, Rule, Site, Taylor
from blockcache.tuning.compare import Arm, compare
from blockcache.tuning.quality import CAP_DB

PROMPTS = ["a small red robot", "a blue robot walks over the snow"]
HALF = Recipe((Rule(Site(), Every(2), Taylor(1)),), name="half")
NOTHING = Recipe((Rule(Site(), Every(1)),), name="all computed")


def call_of(tiny, steps=6, **changes):
    kwargs = {k: v for k, v in tiny.kwargs.items() if k not in ("prompt", "class_labels")}
    return {**kwargs, "num_inference_steps": steps, **changes}


@pytest.fixture
def flux(build_tiny):
    return build_tiny("flux", layers=2)


def render(tiny, seed=0, prompt=PROMPTS[0], **call):
    generator = torch.Generator().manual_seed(seed)
    call = {**call_of(tiny), **call}
    return tiny.pipe(prompt=prompt, generator=generator, output_type="np", **call)[0][0]


def test_figures_follow_from_the_runs(flux):
    found = compare(flux.pipe, HALF, PROMPTS, seeds=[3, 4], repeats=2, **call_of(flux))
    d = found.as_dict()
    assert d["computed_fraction"] == 0.5 and d["steps"] == 6 and d["seeds"] == [3, 4]
    assert d["baseline_s"] == statistics.median(s for i in d["items"] for s in i["baseline_s"])
    assert d["accelerated_s"] == statistics.median(
        s for i in d["items"] for s in i["accelerated_s"]
    )
    assert d["speedup"] == d["baseline_s"] / d["accelerated_s"]
    each = [item["psnr_db"] for item in d["items"]]
    assert d["psnr_db"] == {"median": statistics.median(each), "worst": min(each)}
    assert max(each) < CAP_DB and d["identical"] == 0
    worst = each.index(min(each))
    assert d["worst"] == {"prompt": PROMPTS[worst], "seed": [3, 4][worst]}
    assert d["cache_bytes"] == found.summaries[0]["cache_bytes"] > 0
    assert d["plan"]["blockcache_plan"] == 1 and len(d["items"][0]["baseline_s"]) == 2
    assert "torch" in d["versions"] and d["machine"]["device"] == "cpu"
    assert json.loads(json.dumps(d, allow_nan=False)) == json.loads(json.dumps(d))


def test_pictures_are_those_the_pipeline_gives(flux):
    expected = [render(flux, 5), render(flux, 6, PROMPTS[1])]
    with api.enabled(flux.pipe, HALF):
        cached = render(flux, 5)
    found = compare(flux.pipe, HALF, PROMPTS, seeds=[5, 6], repeats=1, **call_of(flux))
    assert all(map(np.array_equal, found.baseline.pictures, expected))
    assert np.array_equal(found.accelerated.pictures[0], cached)
    assert found.baseline.pictures[0].dtype == np.float32


def test_the_pipeline_is_left_disabled_and_bit_exact(flux):
    before, forward = render(flux), flux.denoiser.forward
    api.enable(flux.pipe, HALF)
    compare(flux.pipe, HALF, PROMPTS[:1], repeats=1, rivals=samplers.rivals, **call_of(flux))
    assert attachment_of(flux.denoiser) is None and flux.denoiser.forward == forward
    assert np.array_equal(render(flux), before)


def test_a_failing_run_leaves_it_disabled_too(flux, monkeypatch):
    scheduler = flux.pipe.scheduler

    def broken(*args, **kwargs):
        if attachment_of(flux.denoiser) is not None:
            raise RuntimeError("out of memory")
        return step(*args, **kwargs)

    step = scheduler.step
    monkeypatch.setattr(scheduler, "step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(flux.pipe, HALF, PROMPTS[:1], repeats=1, **call_of(flux))
    assert attachment_of(flux.denoiser) is None and flux.pipe.scheduler is scheduler


def test_computing_everything_is_identical_and_said_so(flux):
    found = compare(flux.pipe, NOTHING, PROMPTS, repeats=1, **call_of(flux))
    assert found.as_dict()["identical"] == 2 and found.computed_fraction == 1
    assert found.floor_db == CAP_DB
    assert "2 of 2 identical" in str(found) and "two uncached runs: identical" in str(found)


def test_the_floor_is_measured(flux, monkeypatch):
    """A decoder that is not deterministic must show up beside the quality."""
    decode, noise = flux.pipe.vae.decode, torch.Generator().manual_seed(0)

    def shaky(latents, **kwargs):
        shaken = latents + 1e-3 * torch.randn(latents.shape, generator=noise)
        return decode(shaken, **kwargs)

    monkeypatch.setattr(flux.pipe.vae, "decode", shaky)
    found = compare(flux.pipe, NOTHING, PROMPTS[:1], repeats=1, **call_of(flux))
    assert 20 < found.floor_db < CAP_DB
    assert f"{found.floor_db:.1f} dB apart" in str(found)


def test_runs_are_interleaved_and_turned_around(flux):
    """Else a machine that gets slower makes one side look better."""
    order = []
    handle = flux.denoiser.register_forward_pre_hook(
        lambda *_: order.append(attachment_of(flux.denoiser) is not None)
    )
    compare(flux.pipe, HALF, PROMPTS, repeats=2, **call_of(flux, steps=2))
    handle.remove()
    runs = order[::2]
    # First call, warm-up of both, then items 0 and 1 of the first repeat and of the second.
    assert runs == [False, False, True] + [False, True, True, False, True, False, False, True]


def test_progress_counts_the_timed_renders(flux):
    seen = []
    compare(
        flux.pipe,
        HALF,
        PROMPTS,
        repeats=1,
        on_progress=lambda done, total: seen.append((done, total)),
        **call_of(flux, steps=2),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_other_arms_race_in_the_same_loop(flux):
    def rivals(trial):
        assert trial.steps == 6 and trial.computed == (1, 0) * 3 and len(trial.sigmas) == 7
        return [Arm("three", 3), Arm("never", objection="because")]

    found = compare(flux.pipe, HALF, PROMPTS, repeats=1, rivals=rivals, **call_of(flux))
    (three,) = found.rivals
    assert np.array_equal(three.pictures[0], render(flux, num_inference_steps=3))
    assert found.as_dict()["rivals"][0]["steps"] == 3
    assert "never: not run, because" in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": PROMPTS, "seeds": [1]}, "2 prompts but 1 seeds"),
        ({"prompts": PROMPTS, "repeats": 0}, "repeats"),
        ({"prompts": PROMPTS, "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompts": PROMPTS, "output_type": "pil"}, "output_type"),
        ({"prompts": PROMPTS, "generator": None}, "generator"),
        ({"prompts": PROMPTS, "hight": 32}, "FluxPipeline takes no hight"),
        ({"prompts": PROMPTS, "what": "blazing"}, "blazing"),
    ],
)
def test_impossible_requests_are_refused_before_a_run(flux, arguments, message):
    handle = flux.denoiser.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(BlockCacheError, match=message):
        compare(flux.pipe, **arguments)
    handle.remove()


def test_a_plan_for_another_model_is_refused_before_a_run(flux, build_tiny):
    plan = api.plan_for(build_tiny("sd3").pipe, HALF, steps=6)
    handle = flux.denoiser.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(PlanMismatchError, match="SD3"):
        compare(flux.pipe, plan, PROMPTS, **call_of(flux))
    handle.remove()


@pytest.mark.parametrize("name", ["flux", "sd15", "wan"])
def test_the_plan_replays_the_run(build_tiny, name):
    """The plan in the result gives the accelerated picture bit for bit, whatever the sampler."""
    tiny = build_tiny(name)
    first = compare(tiny.pipe, HALF, PROMPTS[:1], repeats=1, **call_of(tiny))
    again = compare(tiny.pipe, first.plan, PROMPTS[:1], repeats=1, **call_of(tiny))
    assert np.array_equal(first.accelerated.pictures[0], again.accelerated.pictures[0])
    assert again.plan == first.plan


def test_every_pipeline_can_be_compared(tiny):
    """Pictures and videos, prompts and classes, one branch and two."""
    prompts = ["1", "2"] if tiny.name == "dit" else PROMPTS
    found = compare(tiny.pipe, HALF, prompts[:1], repeats=1, **call_of(tiny, steps=4))
    is_video = found.baseline.pictures[0].ndim == 4
    assert is_video == (tiny.name in ("wan", "cogvideox", "hunyuan_video", "ltx", "mochi"))
    worst_frame = found.accelerated.scores[0].worst_frame_db
    assert (worst_frame is not None) == is_video
    assert 0 < found.computed_fraction < 1
    assert found.accelerated.scores[0].psnr_db < CAP_DB


def test_a_class_that_is_no_number_is_refused(build_tiny):
    with pytest.raises(BlockCacheError, match="class numbers, found 'cat'"):
        compare(build_tiny("dit").pipe, HALF, ["cat"], num_inference_steps=2)


def test_a_run_that_reuses_nothing_shows_it(flux):
    recipe = Recipe((Rule(Site("span", 1), Gate(0.0)),), name="never")
    found = compare(flux.pipe, recipe, PROMPTS[:1], repeats=1, **call_of(flux))
    assert found.computed_fraction == 1 and found.accelerated.scores[0].is_identical
    assert "100% of the block calls computed" in str(found)
