import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from blockcache.pipelines import samplers
from blockcache.plan import Every, Recipe, Rule, Site
from blockcache.tuning.compare import Arm, Trial, compare

HALF = Recipe((Rule(Site(), Every(2)),), name="half")


def render(tiny, **call):
    return tiny.generate(steps=call.pop("num_inference_steps", 6), **call)[0]


def trial_of(tiny, steps=6, computed=(1, 0, 1, 0, 1, 0)):
    render(tiny, num_inference_steps=steps)
    scheduler = tiny.pipe.scheduler
    sigmas = getattr(scheduler, "sigmas", None)
    return Trial(
        pipe=tiny.pipe,
        steps=steps,
        baseline_s=1.0,
        accelerated_s=0.5,
        computed=computed,
        sigmas=None if sigmas is None else sigmas.clone(),
        timesteps=scheduler.timesteps.clone(),
        seconds=lambda arm: 0.1 + 0.9 * arm.steps / steps,
    )


def arm(tiny, name, **changes) -> Arm:
    return next(a for a in samplers.rivals(trial_of(tiny, **changes)) if a.name == name)


def test_steps_in_time_knows_the_fixed_cost(build_tiny):
    """A text encoder of 10 % of the run: half the time is 4/9 of the steps, not half of them."""
    trial = trial_of(build_tiny("flux", layers=1), steps=90)
    assert samplers.steps_in_time(trial) == 40


@pytest.mark.parametrize(
    ("computed", "chosen"),
    [
        ((1, 0, 1, 0), (0, 2)),
        ((1, 1, 1), (0, 1, 2)),
        ((0.9, 0.2, 1.0, 0.2, 0.7), (0, 2, 4)),
        ((0.2, 0.1, 0.1, 0.1), (0,)),
    ],
)
def test_chosen_steps(computed, chosen):
    assert samplers.chosen_steps(computed) == chosen


def test_the_plans_sigmas_are_visited(build_tiny):
    """The same picture as when the pipeline is given those sigmas by hand."""
    tiny = build_tiny("flux", layers=2)
    chosen = arm(tiny, "plan's sigmas", computed=(1, 1, 0, 0, 1, 0))
    by_hand = render(tiny, num_inference_steps=3, sigmas=[1.0, 5 / 6, 2 / 6])
    with chosen.within():
        pinned = render(tiny, num_inference_steps=chosen.steps)
    assert np.allclose(pinned, by_hand, atol=1e-6)
    assert not np.allclose(pinned, render(tiny, num_inference_steps=3), atol=1e-6)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "ltx"])
def test_all_of_the_sigmas_give_the_uncached_picture(build_tiny, name):
    tiny = build_tiny(name)
    every = arm(tiny, "plan's sigmas", computed=(1,) * 6)
    with every.within():
        pinned = render(tiny, num_inference_steps=6)
    assert np.array_equal(pinned, render(tiny))


def test_unipc_is_set_up_for_flow_matching(build_tiny):
    """Second order: at 12 steps it is nearer to the exact picture than Euler is."""
    tiny = build_tiny("flux", layers=2)
    exact = render(tiny, num_inference_steps=150, latent=True)
    euler = render(tiny, num_inference_steps=12, latent=True)
    with arm(tiny, "UniPC").within():
        unipc = render(tiny, num_inference_steps=12, latent=True)
        assert isinstance(tiny.pipe.scheduler, UniPCMultistepScheduler)
        assert tiny.pipe.scheduler.timesteps.is_floating_point()
        sigmas, times = tiny.pipe.scheduler.sigmas, tiny.pipe.scheduler.timesteps
        assert torch.equal(times, sigmas[:-1] * 1000)
    errors = [float((picture - exact).norm()) for picture in (unipc, euler)]
    assert errors[0] < 0.7 * errors[1]


def test_unipc_visits_the_plans_sigmas(build_tiny):
    tiny = build_tiny("flux", layers=2)
    chosen = arm(tiny, "UniPC, plan's sigmas")
    with chosen.within():
        assert np.isfinite(render(tiny, num_inference_steps=3)).all()
        visited = tiny.pipe.scheduler.sigmas
    assert torch.allclose(visited, torch.tensor([1.0, 4 / 6, 2 / 6, 0.0]), atol=2e-6)


@pytest.mark.parametrize(
    ("name", "rival", "why"),
    [
        ("dit", "plan's sigmas", "DDIMScheduler has no list of sigmas"),
        ("pixart", "UniPC", "multistep solver already"),
        ("mochi", "UniPC", "inverted"),
        ("cogvideox", "UniPC", "noise schedule"),
    ],
)
def test_what_cannot_run_says_why(build_tiny, name, rival, why):
    tiny = build_tiny(name)
    if name == "mochi":
        tiny.pipe.scheduler.register_to_config(invert_sigmas=True)
    assert why in arm(tiny, rival).objection


@pytest.mark.parametrize("name", ["flux", "sd15", "pixart"])
def test_rivals_race_and_the_sampler_comes_back(build_tiny, name, monkeypatch):
    monkeypatch.setattr("blockcache.tuning.compare._TRIALS", 1)
    tiny = build_tiny(name)
    own, settings = tiny.pipe.scheduler, dict(tiny.pipe.scheduler.config)
    call = {k: v for k, v in tiny.kwargs.items() if k != "prompt"}
    found = compare(
        tiny.pipe,
        HALF,
        ["a robot"],
        repeats=1,
        rivals=samplers.rivals,
        num_inference_steps=4,
        **call,
    )
    assert tiny.pipe.scheduler is own and dict(own.config) == settings
    assert len(found.rivals) + len(found.objections) == 4
    assert all(np.isfinite(rival.pictures[0]).all() for rival in found.rivals)
    assert all(1 <= rival.steps <= 4 for rival in found.rivals)


def test_the_sampler_comes_back_after_an_error(build_tiny):
    tiny = build_tiny("flux", layers=1)
    own = tiny.pipe.scheduler
    other = samplers.unipc(own)
    with pytest.raises(KeyError), samplers.swapped(tiny.pipe, other):
        assert tiny.pipe.scheduler is other
        raise KeyError
    assert tiny.pipe.scheduler is own
