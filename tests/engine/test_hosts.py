"""Together with what hosts do: ControlNet, adapters, skip-layer guidance, experts, offloading."""

import gc

import accelerate
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from peft import LoraConfig, get_peft_model_state_dict

import blockcache
import tiny_pipelines
from blockcache import Recipe, Rule, Site
from blockcache.plan import Copy, Every, Taylor
from toys import Scheduler

STEPS = 8


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def run(tiny, steps=STEPS, **changes):
    torch.manual_seed(0)  # SD3's ControlNet pipeline encodes its picture with noise of no generator
    return torch.as_tensor(tiny.generate(steps, latent=True, **changes))


def stack(n, predictor=None):
    return Recipe((Rule(Site("stack"), Every(n), predictor or Copy()),), name=f"every {n}")


def figures(pipe):
    return blockcache.summary(pipe).as_dict()


# ControlNet.


def flux_controlnet(tiny):
    torch.manual_seed(1)
    net = FluxControlNetModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    tiny_pipelines.livelier(net, std=0.1)
    parts = {k: v for k, v in tiny.pipe.components.items() if k not in UNUSED}
    return FluxControlNetPipeline(**parts, controlnet=net)


def sd3_controlnet(tiny):
    torch.manual_seed(1)
    net = SD3ControlNetModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
    )
    tiny_pipelines.livelier(net, std=0.1)
    parts = {k: v for k, v in tiny.pipe.components.items() if k not in UNUSED}
    return StableDiffusion3ControlNetPipeline(**parts, controlnet=net)


UNUSED = ("image_encoder", "feature_extractor")
CONTROLNETS = {"flux": flux_controlnet, "sd3": sd3_controlnet}


@pytest.fixture(params=CONTROLNETS)
def controlled(request, build_tiny):
    tiny = build_tiny(request.param)
    pipe = CONTROLNETS[request.param](tiny)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    kwargs = {**tiny.kwargs, "control_image": image}
    return type(tiny)(request.param, pipe, kwargs)


def test_controlnet_while_computing_everything(controlled):
    """Its residuals are added between the blocks; a loop that runs once adds only one of them."""
    plain = run(controlled)
    without = run(controlled, controlnet_conditioning_scale=0.0)
    assert relative(without, plain) > 1e-3
    for site in (Site("stack"), Site("span", 1), Site("block")):
        blockcache.enable(controlled.pipe, Recipe((Rule(site, Every(1), Taylor(1)),)))
        assert torch.equal(run(controlled), plain)


@pytest.mark.parametrize(
    "site", [Site("stack"), Site("span", 1), Site("span", 1, 3), Site("block")], ids=str
)
def test_controlnet_on_reused_steps(controlled, site):
    """A call that is reused at the input it was computed at must give the same output: nothing that
    the ControlNet adds is lost or counted twice."""
    calls = []
    handle = controlled.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    run(controlled, 1)
    handle.remove()
    args, kwargs = calls[0]
    scheduler = Scheduler(2)
    blockcache.enable(controlled.denoiser, Recipe((Rule(site, Every(2)),)), scheduler=scheduler)
    outputs = []
    with torch.no_grad():
        for i in range(2):
            scheduler.step_index = i
            outputs.append(controlled.denoiser(*args, **kwargs)[0])
    assert (outputs[1] - outputs[0]).abs().max() <= 2e-6 * outputs[0].abs().max()
    (branch,) = figures(controlled.denoiser)["branches"]
    total = len(branch["map"][0])
    lo, hi = site.limits(total)
    # All of the site was skipped, not a part of it.
    assert branch["map"][1] == [int(not lo <= i < hi) for i in range(total)]


def test_controlnet_run_stays_close(controlled):
    plain = run(controlled)
    without = run(controlled, controlnet_conditioning_scale=0.0)
    blockcache.enable(controlled.pipe, stack(2, Taylor(1)))
    cached = run(controlled)
    assert figures(controlled.pipe)["skipped_fraction"] == 0.5
    # Nearer than leaving the ControlNet out, by far.
    assert relative(cached, plain) < 0.3 * relative(without, plain)


def test_controlnet_that_ends_in_the_middle(controlled):
    blockcache.enable(controlled.pipe, stack(2))
    twice = [run(controlled, control_guidance_end=0.5) for _ in range(2)]
    assert torch.equal(*twice)
    blockcache.enable(controlled.pipe, stack(1))
    exact = run(controlled, control_guidance_end=0.5)
    blockcache.disable(controlled.pipe)
    assert torch.equal(run(controlled, control_guidance_end=0.5), exact)


@pytest.mark.parametrize(
    ("site", "skipped"),
    [
        (Site("stack"), range(7)),
        (Site("span", 1), range(1, 7)),
        (Site("span", 1, -1), range(1, 6)),
        (Site("span", 0, 1), range(1)),
        (Site("block", 2, 3), range(2, 3)),
    ],
    ids=str,
)
def test_a_unet_with_a_controlnet(build_tiny, site, skipped):
    """Its residuals go onto the skip connections: no up block receives what a down block gave."""
    tiny = build_tiny("sd15")
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(tiny.denoiser, conditioning_embedding_out_channels=(4, 8))
    tiny_pipelines.livelier(net, std=0.1)
    parts = {k: v for k, v in tiny.pipe.components.items() if k != "image_encoder"}
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    calls = []
    handle = tiny.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    tiny_pipelines.generate(pipe, {**tiny.kwargs, "image": image}, 1, latent=True)
    handle.remove()
    args, kwargs = calls[0]
    scheduler = Scheduler(2)
    blockcache.enable(tiny.denoiser, Recipe((Rule(site, Every(2)),)), scheduler=scheduler)
    outputs = []
    with torch.no_grad():
        for i in range(2):
            scheduler.step_index = i
            outputs.append(tiny.denoiser(*args, **kwargs)[0])
    assert (outputs[1] - outputs[0]).abs().max() <= 2e-6 * outputs[0].abs().max()
    (branch,) = figures(tiny.denoiser)["branches"]
    assert branch["map"][1] == [int(i not in skipped) for i in range(7)]


# Skip-layer guidance.

SLG = dict(
    skip_guidance_layers=[1, 2],
    skip_layer_guidance_scale=2.0,
    skip_layer_guidance_start=0.1,
    skip_layer_guidance_stop=0.8,
)


def test_skip_layer_guidance(build_tiny):
    """A third kind of call without blocks 1 and 2, in the middle of the run only."""
    tiny = build_tiny("sd3")
    plain = run(tiny, **SLG)
    assert relative(run(tiny), plain) > 1e-4
    blockcache.enable(tiny.pipe, stack(1))
    assert torch.equal(run(tiny, **SLG), plain)
    # 0.1 and 0.8 of 8 steps: called at steps 1 to 6.
    main, fewer = figures(tiny.pipe)["branches"]
    assert (main["steps"], main["block_calls"]) == (8, 32)
    assert (fewer["steps"], fewer["block_calls"]) == (6, 12)
    blockcache.enable(tiny.pipe, stack(2))
    cached = run(tiny, **SLG)
    main, fewer = figures(tiny.pipe)["branches"]
    assert (main["computed"], main["reused"], main["block_calls_skipped"]) == (4, 4, 16)
    # Its first call is step 1, computed and watched; 2, 4 and 6 are computed, 3 and 5 reused.
    assert (fewer["computed"], fewer["reused"], fewer["block_calls_skipped"]) == (4, 2, 4)
    assert relative(cached, plain) < 0.5 * relative(run(tiny), plain)


# Two experts.


@pytest.fixture
def experts():
    """Wan 2.2: one transformer for high noise, one for low, and a boundary."""
    pipe, kwargs = tiny_pipelines.wan()
    second = tiny_pipelines.wan()[0].transformer
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    both = WanPipeline(**{**pipe.components, "transformer_2": second}, boundary_ratio=0.85)
    both.set_progress_bar_config(disable=True)
    return both, kwargs


def run_experts(experts, steps=20):
    pipe, kwargs = experts
    return tiny_pipelines.generate(pipe, kwargs, steps, latent=True)


def test_two_experts_have_state_of_their_own(experts):
    pipe, _ = experts
    plain = run_experts(experts)
    blockcache.enable(pipe, stack(1))
    assert torch.equal(run_experts(experts), plain)
    blockcache.enable(pipe, stack(2))
    counts = {"transformer": 0, "transformer_2": 0}
    for name in counts:
        getattr(pipe, name).blocks[0].register_forward_pre_hook(
            lambda *_, name=name: counts.__setitem__(name, counts[name] + 1)
        )
    cached = run_experts(experts)
    assert relative(cached, plain) < 0.1
    high, low = figures(pipe)["models"]
    assert [high["part"], low["part"]] == ["transformer", "transformer_2"]
    for model in (high, low):
        assert len(model["branches"]) == 2
    steps = [model["branches"][0]["steps"] for model in (high, low)]
    assert sum(steps) == 20
    assert min(steps) >= 8
    for model, of in zip((high, low), steps, strict=True):
        # Each expert's first step is computed, whatever the parity of the step it comes at.
        assert model["branches"][0]["map"][0] == [1] * 4
        assert model["branches"][0]["computed"] == (of + 1) // 2
        assert counts[model["part"]] == 2 * ((of + 1) // 2)


def test_two_experts_free_their_payloads(experts):
    pipe, _ = experts
    blockcache.enable(pipe, stack(2, Taylor(1)))
    run_experts(experts)
    gc.collect()
    held = [
        o for o in gc.get_objects() if type(o) is torch.Tensor and tuple(o.shape) == (1, 12, 24)
    ]
    assert held == []


def test_two_experts_say_nothing_about_few_steps(experts, caplog):
    """20 steps are many, though one expert does only some of them."""
    pipe, _ = experts
    blockcache.enable(pipe, stack(2))
    run_experts(experts, 13)
    assert "leaves little to reuse" not in caplog.text


def test_experts_may_be_enabled_one_by_one(experts):
    pipe, _ = experts
    plain = run_experts(experts)
    blockcache.enable(pipe.transformer_2, stack(2))
    cached = run_experts(experts)
    assert not torch.equal(cached, plain)
    assert list(blockcache.summary(pipe).models)[0]["part"] == "transformer_2"
    assert pipe.transformer.blocks[0]._compiled_call_impl is None
    blockcache.disable(pipe)
    assert torch.equal(run_experts(experts), plain)


# Adapters.


@pytest.fixture(scope="module")
def lora():
    """Random LoRA weights for the tiny Flux."""
    transformer = tiny_pipelines.flux(layers=2)[0].transformer
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    transformer.add_adapter(config)
    weights = get_peft_model_state_dict(transformer)
    return {f"transformer.{k}": v.clone() for k, v in weights.items()}


def test_an_adapter_loaded_scaled_and_unloaded_while_enabled(build_tiny, lora):
    recipe = stack(2)

    def fresh(prepare):
        tiny = build_tiny("flux", layers=2)
        prepare(tiny.pipe)
        blockcache.enable(tiny.pipe, recipe)
        return run(tiny)

    def loaded(pipe):
        pipe.load_lora_weights(dict(lora), adapter_name="a")

    def scaled(pipe):
        loaded(pipe)
        pipe.set_adapters(["a"], [0.3])

    def fused(pipe):
        loaded(pipe)
        pipe.fuse_lora()

    without, with_it = fresh(lambda pipe: None), fresh(loaded)
    assert relative(with_it, without) > 1e-3
    tiny = build_tiny("flux", layers=2)
    plain = run(tiny)
    blockcache.enable(tiny.pipe, recipe)
    assert torch.equal(run(tiny), without)
    tiny.pipe.load_lora_weights(dict(lora), adapter_name="a")
    assert torch.equal(run(tiny), with_it)
    assert figures(tiny.pipe)["skipped_fraction"] == 0.5
    tiny.pipe.set_adapters(["a"], [0.3])
    assert torch.equal(run(tiny), fresh(scaled))
    tiny.pipe.set_adapters(["a"], [1.0])
    tiny.pipe.fuse_lora()
    assert torch.equal(run(tiny), fresh(fused))
    tiny.pipe.unfuse_lora()
    tiny.pipe.unload_lora_weights()
    # Fusing and unfusing costs a rounding of the weights.
    assert torch.allclose(run(tiny), without, atol=1e-4)
    blockcache.disable(tiny.pipe)
    assert torch.allclose(run(tiny), plain, atol=1e-4)


def test_an_adapter_scaled_in_the_middle_of_a_run(build_tiny, lora):
    """What was stored with another scale is dropped."""
    tiny = build_tiny("flux", layers=2)
    tiny.pipe.load_lora_weights(dict(lora), adapter_name="a")

    def callback(pipe, index, timestep, tensors):
        if index == 2:
            pipe.set_adapters(["a"], [0.1])
        return tensors

    blockcache.enable(tiny.pipe, stack(4))
    run(tiny, callback_on_step_end=callback)
    (branch,) = figures(tiny.pipe)["branches"]
    # Computed at 0 and 4, and at 3 because nothing was left.
    assert [int(all(row)) for row in branch["map"]] == [1, 0, 0, 1, 1, 0, 0, 0]
    assert figures(tiny.pipe)["reasons"] == {"the adapter or its scale changed within the run": 1}


# Offloading. Both kinds wrap `forward`; on the CPU the devices are the same, the wrapping is not.


def by_blocks(model):
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


def by_leaves(model):
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


def to_meta(model):
    """accelerate's sequential offload: weights live on "meta" but while their layer runs."""
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [by_blocks, by_leaves, to_meta])
@pytest.mark.parametrize("order", ["before", "after"])
def test_offloading_before_and_after_enabling(build_tiny, offload, order):
    recipe = Recipe((Rule(Site("span", 1, 3), Every(2), Taylor(1)),))
    twin = build_tiny("flux", layers=2)
    plain = run(twin)
    blockcache.enable(twin.pipe, recipe)
    cached = run(twin)
    tiny = build_tiny("flux", layers=2)
    if order == "before":
        offload(tiny.denoiser)
        blockcache.enable(tiny.pipe, recipe)
    else:
        blockcache.enable(tiny.pipe, recipe)
        offload(tiny.denoiser)
    for _ in range(2):
        assert torch.equal(run(tiny), cached)
    assert figures(tiny.pipe)["skipped_fraction"] == 0.25
    blockcache.disable(tiny.pipe)
    assert torch.equal(run(tiny), plain)


def test_a_skipped_block_is_not_onloaded(build_tiny, monkeypatch):
    tiny = build_tiny("flux", layers=2)
    by_blocks(tiny.denoiser)
    onloaded = []
    original = ModuleGroup.onload_
    monkeypatch.setattr(
        ModuleGroup,
        "onload_",
        lambda self: (onloaded.append(self.onload_leader), original(self))[1],
    )
    blockcache.enable(tiny.pipe, stack(4))
    run(tiny)
    blocks = {*tiny.denoiser.transformer_blocks, *tiny.denoiser.single_transformer_blocks}
    assert sum(leader in blocks for leader in onloaded) == 2 * len(blocks)


@pytest.mark.parametrize(
    "site", [Site("stack"), Site("span", 1), Site("span", 0, 3), Site("block", 2, 3)], ids=str
)
def test_a_block_never_runs_while_its_group_is_offloaded(build_tiny, monkeypatch, site):
    """Groups of two blocks are onloaded by their first one. Skipping that one and computing its
    mate ran the mate with its weights on the other device."""
    tiny = build_tiny("flux")
    apply_group_offloading(
        tiny.denoiser,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=2,
    )
    onloaded = set()
    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_
    monkeypatch.setattr(
        ModuleGroup, "onload_", lambda self: (onloaded.update(self.modules), onload(self))[1]
    )
    monkeypatch.setattr(
        ModuleGroup,
        "offload_",
        lambda self: (onloaded.difference_update(self.modules), offload(self))[1],
    )
    offended = []
    for blocks in (tiny.denoiser.transformer_blocks, tiny.denoiser.single_transformer_blocks):
        for block in blocks:
            block.attn.to_q.register_forward_pre_hook(
                lambda *_, block=block: offended.append(block) if block not in onloaded else None
            )
    run(tiny, 2)
    assert offended == []
    blockcache.enable(tiny.pipe, Recipe((Rule(site, Every(2)),)))
    run(tiny)
    assert offended == []


def test_the_hosts_own_cache_is_refused(build_tiny):
    tiny = build_tiny("flux", layers=2)
    tiny.denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(blockcache.UnsupportedModelError, match=r"disable_cache\(\)"):
        blockcache.enable(tiny.pipe, "balanced")
    tiny.denoiser.disable_cache()
    blockcache.enable(tiny.pipe, stack(2))
    run(tiny)
    assert figures(tiny.pipe)["skipped_fraction"] == 0.5


def test_the_hosts_own_cache_enabled_afterwards_is_left_to_work_alone(build_tiny, caplog):
    alone, tiny = build_tiny("flux", layers=2), build_tiny("flux", layers=2)
    alone.denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    blockcache.enable(tiny.pipe, stack(2))
    tiny.denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert torch.equal(run(tiny), run(alone))
    assert "cache" in caplog.text


# Samplers. Denoiser calls of a run of five steps, worked out from the papers: Heun and KDPM2 call
# twice but in the last step; PNDM's Runge-Kutta start takes three steps of four calls and goes on
# with 2 more, without it the second step is repeated.

SAMPLERS = {
    "flow Euler": ("sd3", FlowMatchEulerDiscreteScheduler, {}, 5),
    "flow Heun": ("sd3", FlowMatchHeunDiscreteScheduler, {}, 9),
    "DDIM": ("sd15", DDIMScheduler, {}, 5),
    "Heun": ("sd15", HeunDiscreteScheduler, {}, 9),
    "KDPM2": ("sd15", KDPM2DiscreteScheduler, {}, 9),
    "PNDM": ("sd15", PNDMScheduler, {}, 14),
    "PLMS": ("sd15", PNDMScheduler, {"skip_prk_steps": True}, 6),
    "UniPC": ("sd15", UniPCMultistepScheduler, {}, 5),
    "LCM": ("sd15", LCMScheduler, {}, 5),
}


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # the hosts' own, of torch in numpy functions
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(shared, sampler):
    name, scheduler, settings, expected_calls = SAMPLERS[sampler]
    tiny = shared(name)
    kept = tiny.pipe.scheduler
    tiny.pipe.scheduler = scheduler(**settings)
    try:
        plain = tiny.run(5)
        blockcache.enable(tiny.pipe, stack(1))
        assert torch.equal(tiny.run(5), plain)
        blockcache.enable(tiny.pipe, stack(2))
        with tiny.spy() as spy:
            first = tiny.run(5)
        (branch,) = figures(tiny.pipe)["branches"]
        computed = (expected_calls + 1) // 2
        assert (spy.root, branch["steps"], branch["computed"]) == (
            expected_calls,
            expected_calls,
            computed,
        )
        assert set(spy.calls) == {computed}
        assert torch.equal(tiny.run(5), first)
        blockcache.enable(tiny.pipe, Recipe((Rule(Site("span", 1), Every(3), Taylor(2, "sigma")),)))
        assert tiny.run(5).isfinite().all()
        blockcache.disable(tiny.pipe)
        assert torch.equal(tiny.run(5), plain)
    finally:
        blockcache.disable(tiny.pipe)
        tiny.pipe.scheduler = kept


# Batches.


@pytest.mark.parametrize("name", ["flux", "wan", "sd15"])
def test_an_item_alone_equals_the_same_item_in_a_batch(shared, name):
    """A static plan does not look at the tensors, so batch mates cannot matter."""
    tiny = shared(name)
    blockcache.enable(tiny.pipe, "fast")
    prompts = ["a red robot", "snow over the blue"]
    seeds = (3, 4)
    settings = {k: v for k, v in tiny.kwargs.items() if k not in ("prompt", "negative_prompt")}

    def generate(prompts, seeds):
        return tiny.pipe(
            prompt=prompts,
            **settings,
            num_inference_steps=10,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        )[0]

    both = generate(prompts, seeds)
    for i in range(2):
        alone = generate(prompts[i : i + 1], seeds[i : i + 1])
        assert relative(both[i : i + 1], alone) < 1e-4
