"""Enabling, disabling, sharing, copying and interrupting: nothing may be left behind anywhere."""

import copy
import gc
import io
import logging
import pickle
import threading
import weakref

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline

import blockcache
from blockcache import Plan, Recipe, Rule, Site, recipes
from blockcache.engine import hooks
from blockcache.plan import Every, Taylor

STEPS = 6
HALF = Recipe((Rule(Site("stack"), Every(2)),), name="half")
THIRD = Recipe((Rule(Site("stack"), Every(3), Taylor(1)),), name="third")


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def run(tiny, **changes):
    return torch.as_tensor(tiny.generate(STEPS, latent=True, **changes))


def skipped(pipe):
    return blockcache.summary(pipe).as_dict()["skipped_fraction"]


@pytest.fixture
def flux(build_tiny):
    return build_tiny("flux", layers=2)


# Enabling and disabling.


def test_the_second_configuration_counts(flux):
    plain = run(flux)
    blockcache.enable(flux.pipe, THIRD)
    alone = run(flux)
    blockcache.enable(flux.pipe, HALF)
    blockcache.enable(flux.pipe, THIRD)
    assert torch.equal(run(flux), alone)
    assert skipped(flux.pipe) == pytest.approx(4 / 6)
    blockcache.disable(flux.pipe)
    blockcache.disable(flux.pipe)
    assert torch.equal(run(flux), plain)


def test_enable_and_disable_return_what_they_were_given(flux):
    assert blockcache.enable(flux.pipe, HALF) is flux.pipe
    assert blockcache.disable(flux.pipe) is flux.pipe
    assert blockcache.enable(flux.denoiser, HALF) is flux.denoiser
    assert blockcache.disable(flux.denoiser) is flux.denoiser


def test_a_failed_enable_changes_nothing(flux):
    blockcache.enable(flux.pipe, HALF)
    expected = run(flux)
    for wrong in ("no such word", Recipe((Rule(Site("span", 99), Every(2)),)), 7):
        with pytest.raises(blockcache.BlockCacheError):
            blockcache.enable(flux.pipe, wrong)
    assert torch.equal(run(flux), expected)
    assert blockcache.summary(flux.pipe).as_dict()["recipe"] == "half"


@pytest.mark.parametrize("place", [0, 2, 4], ids=["first block", "third block", "denoiser"])
def test_a_failure_while_attaching_is_undone(flux, monkeypatch, place):
    """The hooks attached before the one that failed stayed behind."""
    plain = run(flux)
    attributes = [dict(module.__dict__) for module in flux.denoiser.modules()]
    calls = []
    ensure = hooks._Hook.ensure

    def failing(self):
        calls.append(self)
        if len(calls) == place + 1:
            raise RuntimeError("no more hooks")
        ensure(self)

    monkeypatch.setattr(hooks._Hook, "ensure", failing)
    with pytest.raises(RuntimeError, match="no more hooks"):
        blockcache.enable(flux.pipe, HALF)
    monkeypatch.undo()
    assert [dict(module.__dict__) for module in flux.denoiser.modules()] == attributes
    assert torch.equal(run(flux), plain)


def test_the_with_form_disables_after_an_exception_too(flux):
    plain = run(flux)
    with blockcache.enabled(flux.pipe, HALF) as pipe:
        assert pipe is flux.pipe
        cached = run(flux)
    assert torch.equal(run(flux), plain)
    with pytest.raises(KeyboardInterrupt), blockcache.enabled(flux.pipe, HALF):
        raise KeyboardInterrupt
    assert torch.equal(run(flux), plain)
    assert 1e-5 < relative(cached, plain) < 0.3


def test_a_recipe_and_a_plan_serve_two_pipelines_and_stay_as_they_are(build_tiny):
    wan, flux = build_tiny("wan"), build_tiny("flux")
    recipe = recipes.geometric(0.5)
    text = repr(recipe)
    for tiny in (wan, flux):
        blockcache.enable(tiny.pipe, "balanced")
    fresh = [run(wan), run(flux)]
    for order in ((wan, flux), (flux, wan)):
        for tiny in order:
            blockcache.enable(tiny.pipe, recipe)
            run(tiny)
    assert repr(recipe) == text
    for tiny, expected in zip((wan, flux), fresh, strict=True):
        blockcache.enable(tiny.pipe, "balanced")
        assert torch.equal(run(tiny), expected)
    twin = build_tiny("flux")
    plan = blockcache.plan_for(flux.pipe, "fast", steps=STEPS)
    before = plan.to_json()
    blockcache.enable(flux.pipe, plan)
    blockcache.enable(twin.pipe, plan)
    assert torch.equal(run(flux), run(twin))
    assert plan.to_json() == before
    assert Plan.from_json(before) == plan


@pytest.mark.parametrize("first_off", [0, 1])
def test_two_pipelines_of_one_class(build_tiny, first_off):
    pair = [build_tiny("flux", layers=2) for _ in range(2)]
    plain = run(pair[0])
    blockcache.enable(pair[0].pipe, HALF)
    # The other one is not touched, nor is one built now.
    assert torch.equal(run(pair[1]), plain)
    assert torch.equal(run(build_tiny("flux", layers=2)), plain)
    blockcache.enable(pair[1].pipe, THIRD)
    half, third = run(pair[0]), run(pair[1])
    assert skipped(pair[0].pipe) == pytest.approx(1 / 2)
    assert skipped(pair[1].pipe) == pytest.approx(2 / 3)
    blockcache.disable(pair[first_off].pipe)
    other = 1 - first_off
    assert torch.equal(run(pair[first_off]), plain)
    assert torch.equal(run(pair[other]), (half, third)[other])
    blockcache.disable(pair[other].pipe)
    assert torch.equal(run(pair[other]), plain)


def test_a_pipeline_that_shares_the_transformer(flux):
    """Image-to-image over the same parts: cached too, with runs of its own."""
    plain = run(flux)
    second = FluxImg2ImgPipeline(**flux.pipe.components)
    second.set_progress_bar_config(disable=True)

    def img2img():
        settings = {k: v for k, v in flux.kwargs.items()}
        return second(
            **settings,
            image=torch.zeros(1, 3, 32, 32),
            strength=0.7,
            num_inference_steps=10,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )[0]

    uncached = img2img()
    blockcache.enable(flux.pipe, HALF)
    fresh_text, fresh_image = run(flux), img2img()
    (branch,) = blockcache.summary(second).as_dict()["branches"]
    assert (branch["steps"], branch["computed"]) == (7, 4)
    assert 1e-5 < relative(fresh_image, uncached) < 0.3
    for _ in range(2):
        assert torch.equal(run(flux), fresh_text)
        assert torch.equal(img2img(), fresh_image)
    blockcache.disable(second)
    assert torch.equal(run(flux), plain)


def test_a_deleted_pipeline_is_freed(build_tiny):
    tiny = build_tiny("flux", layers=2)
    blockcache.enable(tiny.pipe, HALF)
    run(tiny)
    refs = [weakref.ref(tiny.pipe), weakref.ref(tiny.denoiser), weakref.ref(tiny.pipe.scheduler)]
    del tiny
    gc.collect()
    assert [ref() for ref in refs] == [None, None, None]


# Other settings from run to run.


def test_steps_size_batch_and_guidance_may_change_between_runs(flux, build_tiny):
    changes = [
        dict(),
        dict(height=48, width=32),
        dict(num_images_per_prompt=2),
        dict(guidance_scale=1.0),
        dict(true_cfg_scale=3.0, negative_prompt="bad"),
        dict(max_sequence_length=16),
        dict(),
    ]
    blockcache.enable(flux.pipe, HALF)
    in_a_row = [run(flux, **change) for change in changes]
    for change, result in zip(changes, in_a_row, strict=True):
        fresh = build_tiny("flux", layers=2)
        blockcache.enable(fresh.pipe, HALF)
        assert torch.equal(run(fresh, **change), result), change
    for steps in (9, 4, 9):
        fresh = build_tiny("flux", layers=2)
        blockcache.enable(fresh.pipe, HALF)
        ours, theirs = flux.generate(steps, latent=True), fresh.generate(steps, latent=True)
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@pytest.mark.parametrize("name", ["flux", "wan", "sd15"])
def test_half_precision_and_a_change_of_dtype_between_runs(build_tiny, name):
    tiny, fresh, uncached = (build_tiny(name) for _ in range(3))
    blockcache.enable(tiny.pipe, THIRD)
    run(tiny)
    for one in (tiny, fresh, uncached):
        one.pipe.to(torch.bfloat16)
    blockcache.enable(fresh.pipe, THIRD)
    cached = run(tiny)
    assert cached.dtype == torch.bfloat16
    assert torch.equal(cached, run(fresh))
    plain = run(uncached)
    blockcache.enable(uncached.pipe, Recipe((Rule(Site("block"), Every(1), Taylor(1)),)))
    assert torch.equal(run(uncached), plain)
    # A payload costs half of what it costs in float32.
    half = blockcache.summary(tiny.pipe).as_dict()["cache_bytes"]
    tiny.pipe.to(torch.float32)
    run(tiny)
    assert blockcache.summary(tiny.pipe).as_dict()["cache_bytes"] == 2 * half


def test_true_guidance_makes_two_branches_on_flux(flux):
    blockcache.enable(flux.pipe, HALF)
    run(flux, true_cfg_scale=3.0, negative_prompt="bad")
    branches = blockcache.summary(flux.pipe).as_dict()["branches"]
    assert [(b["computed"], b["reused"]) for b in branches] == [(3, 3), (3, 3)]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_model_that_calls_twice_for_guidance(build_tiny, guidance):
    """With guidance off there is one call a step: counting calls in pairs would halve the run."""
    wan = build_tiny("wan")
    plain = run(wan, guidance_scale=guidance)
    blockcache.enable(wan.pipe, HALF)
    for scale in (guidance, 6.0 - guidance, guidance):
        last = run(wan, guidance_scale=scale)
        branches = blockcache.summary(wan.pipe).as_dict()["branches"]
        assert [(b["computed"], b["reused"]) for b in branches] == [(3, 3)] * (1 + (scale > 1))
    assert 1e-6 < relative(last, plain) < 0.1


def test_the_two_branches_do_not_share_state(build_tiny):
    """Mixing them up costs an order of magnitude: guidance multiplies their difference."""
    wan = build_tiny("wan")
    plain = run(wan)
    blockcache.enable(wan.pipe, Recipe((Rule(Site("stack"), Every(2), Taylor(1)),)))
    right = relative(run(wan), plain)
    assert right < 0.05


def test_guidance_switched_off_in_the_middle_of_a_run(build_tiny):
    """A known trick: from some step on the batch of two is one. Nothing of the old size fits."""
    sd15 = build_tiny("sd15")

    def cut(pipe, index, timestep, tensors):
        if index == 3:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    settings = dict(
        callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]
    )
    plain = torch.as_tensor(sd15.generate(9, latent=True, **settings))
    everything = Recipe((Rule(Site("span", 1), Every(1)),))
    blockcache.enable(sd15.pipe, everything)
    assert torch.equal(torch.as_tensor(sd15.generate(9, latent=True, **settings)), plain)
    blockcache.enable(sd15.pipe, HALF)
    twice = [torch.as_tensor(sd15.generate(9, latent=True, **settings)) for _ in range(2)]
    assert torch.equal(*twice)
    both, one = blockcache.summary(sd15.pipe).as_dict()["branches"]
    # Steps 0 to 3, then 4 to 8; step 4 is due, and would be computed as the first of its size.
    assert [int(all(row)) for row in both["map"]] == [1, 0, 1, 0]
    assert [int(all(row)) for row in one["map"]] == [1, 0, 1, 0, 1]


# Interruptions.


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_exception_from_a_callback(flux, error):
    def callback(pipe, index, timestep, tensors):
        if index == 3:
            raise error
        return tensors

    blockcache.enable(flux.pipe, THIRD)
    fresh = run(flux)
    with pytest.raises(error):
        run(flux, callback_on_step_end=callback)
    assert torch.equal(run(flux), fresh)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1, 2], ids=["first step", "second", "third"])
def test_an_exception_from_within_a_block(flux, error, call):
    """From the watched forward, from a computed one, and from the predicted one's end."""
    blockcache.enable(flux.pipe, Recipe((Rule(Site("span", 0, 3), Every(2)),)))
    fresh = run(flux)
    block = flux.denoiser.single_transformer_blocks[1]
    calls = []

    def failing(module, args):
        calls.append(1)
        if len(calls) == call + 1:
            raise error

    handle = block.register_forward_pre_hook(failing)
    with pytest.raises(error):
        run(flux)
    handle.remove()
    assert torch.equal(run(flux), fresh)
    blockcache.disable(flux.pipe)
    plain = run(flux)
    blockcache.enable(flux.pipe, THIRD)
    blockcache.disable(flux.pipe)
    assert torch.equal(run(flux), plain)


def test_a_run_that_the_host_interrupts(flux):
    """`pipe._interrupt` makes diffusers skip the rest of the loop without an exception."""

    def callback(pipe, index, timestep, tensors):
        pipe._interrupt = index == 2
        return tensors

    blockcache.enable(flux.pipe, THIRD)
    fresh = run(flux)
    run(flux, callback_on_step_end=callback)
    assert torch.equal(run(flux), fresh)


# Threads.


def in_threads(*functions):
    results, errors = {}, []

    def work(i, function):
        try:
            results[i] = [function() for _ in range(2)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    assert not errors
    return [results[i] for i in range(len(functions))]


def test_two_threads_with_pipelines_of_their_own(build_tiny):
    pair = [build_tiny("flux", layers=2), build_tiny("flux", layers=2)]
    for tiny in pair:
        blockcache.enable(tiny.pipe, THIRD)
    expected = [run(pair[0], height=32), run(pair[1], height=48)]
    got = in_threads(lambda: run(pair[0], height=32), lambda: run(pair[1], height=48))
    for results, wanted in zip(got, expected, strict=True):
        assert all(torch.equal(result, wanted) for result in results)


def test_two_threads_whose_pipelines_share_the_transformer(flux):
    """Same shapes, other prompts' seeds: state mixed up between threads would show."""
    parts = dict(flux.pipe.components)
    parts["scheduler"] = type(flux.pipe.scheduler).from_config(flux.pipe.scheduler.config)
    other = FluxPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    blockcache.enable(flux.pipe, THIRD)

    def first():
        return run(flux)

    def second():
        return other(
            **flux.kwargs,
            num_inference_steps=9,
            generator=torch.Generator().manual_seed(7),
            output_type="latent",
        )[0]

    expected = [first(), second()]
    for results, wanted in zip(in_threads(first, second), expected, strict=True):
        assert all(torch.equal(result, wanted) for result in results)


# Copies.


def zeroed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved(model),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_enabled_model_is_a_plain_one_with_its_own_weights(flux, how):
    plain = run(flux)
    blockcache.enable(flux.pipe, THIRD)
    cached = run(flux)
    twin = COPIES[how](flux.denoiser)
    parts = {**flux.pipe.components, "transformer": twin}
    parts["scheduler"] = type(flux.pipe.scheduler).from_config(flux.pipe.scheduler.config)
    other = type(flux)("flux", FluxPipeline(**parts), flux.kwargs)
    other.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(run(other), plain)
    with pytest.raises(blockcache.BlockCacheError, match="nothing is enabled"):
        blockcache.summary(twin)
    # The copy can be enabled by itself, and its weights are its own.
    blockcache.enable(other.pipe, THIRD)
    assert torch.equal(run(other), cached)
    blockcache.disable(other.pipe)
    zeroed(twin)
    assert not run(other).equal(plain)
    assert torch.equal(run(flux), cached)


def test_gradients_through_an_enabled_model(flux, caplog):
    """Training goes past the cache: outputs and gradients are those of the plain model."""
    model = flux.denoiser
    generator = torch.Generator().manual_seed(0)

    def call():
        generator.manual_seed(0)
        model.zero_grad()
        out = model(
            hidden_states=torch.randn(1, 16, 16, generator=generator),
            encoder_hidden_states=torch.randn(1, 4, 32, generator=generator),
            pooled_projections=torch.randn(1, 32, generator=generator),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(4, 3),
            guidance=torch.tensor([3.5]),
            return_dict=False,
        )[0]
        out.square().sum().backward()
        return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain_out, plain_gradients = call()
    blockcache.enable(flux.pipe, HALF)
    for _ in range(3):
        out, gradients = call()
        assert torch.equal(out, plain_out)
        assert len(gradients) == len(plain_gradients) > 20
        assert all(torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True))
    assert "gradients are enabled" in caplog.text


# Memory.


@pytest.fixture
def new_tensors():
    """A function that gives the shapes of larger tensors made since the test began and alive."""
    gc.collect()
    gc.freeze()  # what is there already is not looked at, which also makes looking quick

    def shapes():
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() >= 500]
        return sorted(tuple(o.shape) for o in found)

    yield shapes
    gc.unfreeze()


# One stack residual: image (and text) tokens x channels.
PAYLOADS = {
    "flux": [(1, 32, 32), (1, 64, 32)],
    "pixart": [(2, 64, 32)],
    "hunyuan_video": [(1, 32, 32), (1, 48, 32)],
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_after_a_run_no_payload_stays_alive(build_tiny, new_tensors, name):
    tiny = build_tiny(name)
    tiny.generate(2)  # fills what hosts keep, such as position embeddings
    blockcache.enable(tiny.pipe, recipes.geometric(0.5, order=1))
    gc.freeze()
    held = []

    def look(module, args):
        held.append(new_tensors() if len(held) == 4 else None)

    handle = tiny.denoiser.register_forward_pre_hook(look)
    tiny.generate(STEPS, latent=True)
    handle.remove()
    # Before the fifth call two payloads are held; other tensors of the run are there as well.
    for shape in PAYLOADS[name]:
        assert held[4].count(shape) >= 2
    after = new_tensors()
    assert [shape for shape in after if shape in PAYLOADS[name]] == []


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_after_an_interrupted_run_disabling_frees_everything(flux, new_tensors, error):
    run(flux)
    gc.freeze()

    def callback(pipe, index, timestep, tensors):
        if index == 3:
            raise error
        return tensors

    blockcache.enable(flux.pipe, THIRD)
    try:
        run(flux, callback_on_step_end=callback)
    except error:
        pass
    blockcache.disable(flux.pipe)
    assert [shape for shape in new_tensors() if shape in PAYLOADS["flux"]] == []


def test_enabling_allocates_nothing_and_says_what_it_did(flux, new_tensors, caplog):
    with caplog.at_level(logging.INFO, logger="blockcache"):
        blockcache.enable(flux.pipe, HALF)
    assert new_tensors() == []
    assert "FluxTransformer2DModel: enabled half on 4 blocks" in caplog.text
