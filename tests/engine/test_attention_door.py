"""The door from diffusers' attention to the planners, on tiny pipelines and denoisers.

`Watcher` is a planner that keeps everything and notes what it was asked; it shows what reaches the
planners. Its results are dense attention's, so outputs may differ in rounding only.
"""

import logging
import threading
from typing import Annotated, ClassVar

import diffusers
import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import blockcache
import tiny_pipelines
from blockcache import Recipe, Rule, Site, Sparse
from blockcache.engine import attention
from blockcache.errors import PlanError
from blockcache.kernels.sparse_attention import SparsePlan
from blockcache.plan import Every, Plan
from blockcache.plan.spec import spec
from blockcache.sparse import Card, Decision, Planner, by_name, names
from toys import Scheduler

SIZE = Annotated[int, Field(ge=0)]
PIPELINES = ("wan", "cogvideox", "hunyuan_video", "ltx", "mochi", "flux", "sd3", "pixart", "dit")


@spec
class Watcher(Planner):
    """Keeps a share of the blocks (all by default), the first ones of each row.

    memory: bytes that it claims for its state. fails_at: the step in which it gives up.
    """

    share: float = 1.0
    memory: SIZE = 0
    fails_at: int = -1

    card: ClassVar[Card] = Card("none", "as given", "none", "first")
    seen: ClassVar[list] = []

    def plan(self, q, k, v, geometry, state, context):
        self.seen.append((id(state), q, k, geometry, context))
        state.tensors.setdefault("mark", torch.zeros(4))
        if context.step.index == self.fails_at:
            raise PlanError("the watcher gave up")
        blocks = -(-geometry.video // 16)
        mask = torch.arange(blocks) < max(1, round(self.share * blocks))
        return Decision(SparsePlan.from_mask(mask.expand(1, 1, blocks, blocks).clone(), 16, 16))

    def state_bytes(self, geometry, batch, heads, head_dim, itemsize):
        return self.memory


@pytest.fixture
def seen():
    """What the watcher was asked in this test: (state, q, k, geometry, context) each."""
    Watcher.seen.clear()
    yield Watcher.seen
    Watcher.seen.clear()


def sparse(planner=None, **settings):
    """A sparse rule without the limits that keep tiny models dense."""
    defaults = dict(dense_steps=0, dense_layers=0, min_length=0, max_density=1.0)
    return Sparse(planner or Watcher(), **(defaults | settings))


def thin(**settings):
    """A recipe that really leaves something out."""
    return Recipe(sparse=sparse(Watcher(share=0.5), **settings), name="thin")


def figures(target):
    return blockcache.summary(target).as_dict()["attention"]


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- on pipelines --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_keeping_everything_is_dense_attention_and_disabling_gives_the_pipeline_back(name, shared):
    one = shared(name)
    plain = one.plain()
    blockcache.enable(one.pipe, Recipe(sparse=sparse()))
    out = one.run()
    found = figures(one.pipe)
    assert error(out, plain) < 1e-5
    assert found["density"] == 1 and found["recall"] == pytest.approx(1)
    assert found["sparse_calls"] >= 4 * 4 and found["dense_calls"] == {}
    blockcache.disable(one.pipe)
    assert torch.equal(one.run(), plain)
    assert not _get_current_function_mode_stack()


# Layers x steps x calls: guidance is two calls a step on Wan; Mochi attends once per sample.
CALLS = dict(wan=4 * 4 * 2, cogvideox=16, hunyuan_video=32, ltx=16, mochi=4 * 4 * 2, flux=32)


@pytest.mark.parametrize("name", CALLS)
def test_every_self_attention_is_seen_by_either_route(name, shared, seen):
    """Wan, LTX, HunyuanVideo and Flux go through the dispatcher, CogVideoX and Mochi do not."""
    one = shared(name)
    larger = dict(height=64, width=64) if name == "wan" else {}
    plain = one.plain(**larger)
    blockcache.enable(one.pipe, thin())
    out = one.run(**larger)
    found = figures(one.pipe)
    assert found["sparse_calls"] == len(seen) == CALLS[name]
    assert all(q.shape == k.shape for _, q, k, _, _ in seen)
    layers = [row["layer"] for row in found["layers"]]
    assert layers == list(range(8 if name in ("flux", "hunyuan_video") else 4))
    if seen[0][3].video > 16:
        assert found["density"] < 1 and 1e-6 < error(out, plain) < 0.5


class Spy(TorchFunctionMode):
    """Notes the lengths of queries and keys of attention calls that nobody took over."""

    def __init__(self):
        super().__init__()
        self.crossed = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = (*args, kwargs.get("query"), kwargs.get("key"))[:2]
            # Sparse attention itself runs torch's, on one head at a time.
            if q.shape != k.shape and q.shape[1] > 1:
                self.crossed.append((q, k))
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_cross_attention_stays_the_hosts(name, shared):
    one = shared(name)
    blockcache.enable(one.pipe, Recipe(sparse=sparse()))
    with Spy() as sparse_spy:
        one.run(steps=1)
    blockcache.disable(one.pipe)
    with Spy() as plain_spy:
        one.run(steps=1)
    assert len(sparse_spy.crossed) == len(plain_spy.crossed) == (8 if name == "wan" else 4)
    for (q, k), (plain_q, plain_k) in zip(sparse_spy.crossed, plain_spy.crossed, strict=True):
        assert torch.equal(k, plain_k) and error(q, plain_q) < 1e-5


def test_without_a_sparse_step_the_output_is_the_hosts_bit_for_bit(shared):
    one = shared("wan")
    plain = one.plain()
    blockcache.enable(one.pipe, thin(dense_steps=4))
    assert torch.equal(one.run(), plain)
    assert figures(one.pipe)["dense_calls"] == {"first steps": 32}


@pytest.mark.parametrize(
    ("settings", "steps", "layers"),
    [
        (dict(dense_steps=0.5), {2, 3}, {0, 1, 2, 3}),
        (dict(dense_steps=1, dense_last=2), {1}, {0, 1, 2, 3}),
        (dict(dense_layers=0.5), {0, 1, 2, 3}, {2, 3}),
        (dict(dense_layers=3), {0, 1, 2, 3}, {3}),
        (dict(dense_layers=(0, 2)), {0, 1, 2, 3}, {1, 3}),
        (dict(dense_layers=()), {0, 1, 2, 3}, {0, 1, 2, 3}),
    ],
)
def test_steps_and_layers_that_stay_dense(settings, steps, layers, shared, seen):
    one = shared("ltx")
    blockcache.enable(one.pipe, Recipe(sparse=sparse(**settings)))
    one.run()
    assert {context.step.index for *_, context in seen} == steps
    assert {context.layer for *_, context in seen} == layers
    dense = figures(one.pipe)["dense_calls"]
    assert sum(dense.values()) == 16 - len(seen)


@pytest.mark.parametrize(("limit", "first"), [(None, 4), (0.5, 2), (3, 3), (0, 0)])
def test_layers_may_stay_dense_for_a_part_of_the_run(limit, first, shared, seen):
    """Of four steps; from `first` on, layers 0 and 2 are thinned out as all others are."""
    one = shared("ltx")
    rule = sparse(dense_layers=(0, 2), dense_layers_steps=limit)
    blockcache.enable(one.pipe, Recipe(sparse=rule))
    one.run()
    asked = {(context.layer, context.step.index) for *_, context in seen}
    others = {(layer, step) for layer in (1, 3) for step in range(4)}
    thinned = {(layer, step) for layer in (0, 2) for step in range(first, 4)}
    assert asked == others | thinned


def test_planners_are_asked_anew_when_the_schedule_says(shared, seen):
    one = shared("ltx")
    blockcache.enable(one.pipe, Recipe(sparse=sparse(refresh=2, dense_steps=1)))
    one.run(steps=6)
    asked = {context.step.index for *_, context in seen if context.refresh}
    assert asked == {1, 3, 5}


def test_states_belong_to_branch_block_and_run(shared, seen):
    one = shared("wan")
    blockcache.enable(one.pipe, Recipe(sparse=sparse()))
    one.run()
    keep_ids_unique = [state for state, *_ in seen]
    users = {}
    for state, *_, context in seen:
        users.setdefault(state, []).append((context.layer, context.step.index))
    assert len(users) == 4 * 2 and len(keep_ids_unique) == 32
    for places in users.values():
        assert places == [(places[0][0], step) for step in range(4)]
    assert figures(one.pipe)["state_bytes"] == 8 * 16


def test_nothing_is_remembered_after_the_last_step(shared):
    one = shared("wan")
    blockcache.enable(one.pipe, Recipe(sparse=sparse()))
    one.run()
    runner = one.denoiser._compiled_call_impl.engine
    assert runner._local.run.sparse._branches == {}


def test_text_and_padding_are_told_to_the_planner(shared, seen):
    one = shared("hunyuan_video")
    blockcache.enable(one.pipe, Recipe(sparse=sparse()))
    one.run(steps=1)
    geometries = {geometry for *_, geometry, _ in seen}
    (geometry,) = geometries
    # The prompt takes 38 characters and a start token of 32 places: nothing is padding here.
    assert geometry.grid == (3, 4, 4) and (geometry.before, geometry.after) == (0, 32)
    assert geometry.valid is None
    seen.clear()
    plain_short = one.plain(steps=2, prompt="a cat")
    blockcache.enable(one.pipe, Recipe(sparse=sparse()))
    assert error(one.run(steps=2, prompt="a cat"), plain_short) < 1e-5
    assert {geometry.valid for *_, geometry, _ in seen} == {(48 + 6,)}


def test_sizes_and_batches_may_change_between_runs(shared):
    one = shared("wan")
    changes = [dict(), dict(height=48), dict(num_frames=5), dict(prompt=["a", "b"]), dict()]
    for change in changes:
        if "prompt" in change:
            change["negative_prompt"] = ["", ""]
    plain = [one.plain(steps=2, **change) for change in changes]
    blockcache.enable(one.pipe, Recipe(sparse=sparse()))
    for change, expected in zip(changes, plain, strict=True):
        assert error(one.run(steps=2, **change), expected) < 1e-5


def test_caching_and_sparse_attention_together(shared, seen):
    one = shared("ltx")
    blockcache.enable(
        one.pipe, Recipe((Rule(Site("span", 1, 3), Every(2)),), sparse=sparse(Watcher(share=0.5)))
    )
    first = one.run()
    found = blockcache.summary(one.pipe).as_dict()
    assert found["skipped_fraction"] == 4 / 16
    places = [(context.step.index, context.layer) for *_, context in seen]
    assert places == [(s, b) for s in range(4) for b in range(4) if s % 2 == 0 or b in (0, 3)]
    assert torch.equal(one.run(), first)


def test_a_reused_attention_is_not_asked(shared, seen):
    one = shared("wan")
    rule = Rule(Site("attn"), Every(2), payload="output")
    blockcache.enable(one.pipe, Recipe((rule,), sparse=sparse()))
    one.run()
    assert {context.step.index for *_, context in seen} == {0, 2}


@pytest.mark.parametrize("name", names())
def test_every_planner_runs_by_its_name(name, shared):
    one = shared("wan")
    blockcache.enable(one.pipe, name)
    plain = one.run(steps=2)
    blockcache.enable(one.pipe, Recipe(sparse=sparse(by_name(name))))
    out = one.run(steps=2)
    assert torch.isfinite(out).all() and error(out, plain) < 1
    text = str(blockcache.summary(one.pipe))
    assert type(by_name(name)).__name__ in text


def test_the_summary_shows_density_and_recall_of_each_layer(shared):
    one = shared("ltx")
    blockcache.enable(one.pipe, thin(dense_steps=1))
    one.run()
    lines = str(blockcache.summary(one.pipe)).splitlines()
    assert lines[0] == "blockcache  LTXVideoTransformer3DModel  thin"
    assert lines[3].startswith("attention: Watcher   sparse calls 12   density 0.50   recall 0.")
    assert lines[4].split() == ["layer", "0", "1", "2", "3"]
    assert lines[5].split() == ["density", "0.50", "0.50", "0.50", "0.50"]
    word, *recalls = lines[6].split()
    assert word == "recall" and all(0.4 < float(recall) < 0.6 for recall in recalls)
    assert lines[7].split() == ["dense:", "first", "steps", "(4)"]


def test_the_figures_have_a_map_of_densities(shared):
    """Of steps and layers, None where attention was dense."""
    one = shared("ltx")
    blockcache.enable(one.pipe, thin(dense_steps=1, dense_layers=1, dense_last=1))
    one.run()
    found = figures(one.pipe)["map"]
    steps = len(found) + 1
    assert found[0] == [None] * 4 and steps > 2
    for row in found[1:]:
        assert row[0] is None and row[1:] == pytest.approx([0.5] * 3, abs=0.01)


# ---- what stays dense, and why -------------------------------------------------------------------


def reasons(one, recipe, **changes):
    """The output, and why attention stayed dense."""
    blockcache.enable(one.pipe, recipe)
    return one.run(**changes), figures(one.pipe)["dense_calls"]


def test_short_sequences_stay_dense(shared, caplog):
    one = shared("ltx")
    plain = one.plain()
    with caplog.at_level(logging.WARNING, "blockcache"):
        out, why = reasons(one, thin(min_length=None))
    assert torch.equal(out, plain)
    assert why == {"192 tokens are fewer than the 1024 from which it pays": 16}
    said = [record.message for record in caplog.records if "fewer than" in record.message]
    assert len(said) == 1


def test_sites_that_keep_too_much_rest(shared, monkeypatch):
    monkeypatch.setattr(attention, "RETRY_AFTER", 2)
    one = shared("ltx")
    out, why = reasons(one, Recipe(sparse=sparse(max_density=0.9)), steps=8)
    # Tried in steps 0, 3 and 6: two steps of rest after each.
    assert figures(one.pipe)["sparse_calls"] == 3 * 4
    assert why == {"plans kept more than 90% of the blocks": 5 * 4}


def test_the_budget_limits_what_planners_may_remember(shared, seen):
    one = shared("ltx")
    half_a_mib = Watcher(memory=2**19)
    _, why = reasons(one, Recipe(sparse=sparse(half_a_mib, budget_mib=1.5)))
    assert {context.layer for *_, context in seen} == {0, 1, 2}
    assert why == {"the budget of 1.5 MiB is spent": 4}


def test_a_planner_that_gives_up_leaves_it_to_the_host(shared):
    one = shared("ltx")
    plain = one.plain()
    out, why = reasons(one, Recipe(sparse=sparse(Watcher(fails_at=2))))
    assert why == {"the watcher gave up": 4}
    assert error(out, plain) < 1e-5


def test_a_chosen_attention_backend_is_left_alone(shared, monkeypatch):
    one = shared("wan")
    plain = one.plain()
    from diffusers.models import attention_dispatch as dispatch

    name = dispatch.AttentionBackendName._NATIVE_MATH
    monkeypatch.setattr(dispatch._AttentionBackendRegistry, "_active_backend", name)
    out, why = reasons(one, thin())
    assert list(why) == [
        "the attention backend '_native_math' was chosen; reset_attention_backend() undoes it"
    ]
    monkeypatch.undo()
    processor = one.denoiser.blocks[0].attn1.processor
    monkeypatch.setattr(processor, "_attention_backend", name, raising=False)
    _, why = reasons(one, thin())
    assert len(why) == 1 and figures(one.pipe)["sparse_calls"] == 0
    monkeypatch.undo()
    blockcache.disable(one.pipe)
    assert torch.equal(one.run(), plain)


def test_unets_stay_dense(shared):
    one = shared("sd15")
    plain = one.plain()
    out, why = reasons(one, thin())
    assert torch.equal(out, plain)
    assert why == {
        "UNet2DConditionModel is in no table of geometries and has latents that are no tensor": 28
    }


@pytest.mark.parametrize("what", ["blocks", "forwards", "modules", "a part"])
def test_compiled_blocks_keep_their_graph_and_stay_dense(what, build_tiny):
    torch._dynamo.reset()
    tiny = build_tiny("ltx", layers=2)
    plain = torch.as_tensor(tiny.generate(2, latent=True))
    blocks = tiny.denoiser.transformer_blocks
    for i, block in enumerate(blocks):
        if what == "blocks":
            block.compile(backend="eager", fullgraph=True)
        elif what == "forwards":
            block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
        elif what == "modules":
            blocks[i] = torch.compile(block, backend="eager", fullgraph=True)
        else:
            block.attn1.compile(backend="eager", fullgraph=True)
    blockcache.enable(tiny.pipe, thin())
    out = torch.as_tensor(tiny.generate(2, latent=True))
    assert torch.equal(out, plain)
    assert figures(tiny.pipe)["dense_calls"] == {
        "the block is compiled, so its attention is not seen": 4
    }
    torch._dynamo.reset()


def test_a_run_that_thinned_out_nothing_says_so(shared, caplog):
    one = shared("ltx")
    with caplog.at_level(logging.WARNING, "blockcache"):
        reasons(one, thin(dense_steps=50))
    said = [record.message for record in caplog.records]
    assert said == ["LTXVideoTransformer3DModel: no attention was made sparse: first steps"]


# ---- on denoisers --------------------------------------------------------------------------------


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def wan(cls=diffusers.WanTransformer3DModel, **settings):
    torch.manual_seed(0)
    model = cls(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=16, num_layers=2, **settings,
    )  # fmt: skip
    call = dict(
        hidden_states=random(1, 4, 3, 8, 8), timestep=torch.tensor([500.0]),
        encoder_hidden_states=random(1, 5, 16), return_dict=False,
    )  # fmt: skip
    return tiny_pipelines.livelier(model), call


def drive(model, call, recipe=None, steps=2):
    """The output of each step; enabled if there is a recipe."""
    scheduler = Scheduler(steps)
    if recipe is not None:
        blockcache.enable(model, recipe, scheduler=scheduler)
    outputs = []
    for step in range(steps):
        scheduler.step_index = step
        with torch.no_grad():
            outputs.append(model(**call)[0])
    return torch.stack(outputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_no_numbers_stay_dense(value):
    model, call = wan()
    call["hidden_states"][0, 0, 0, 0, 0] = value
    plain = drive(model, call)
    out = drive(model, call, thin())
    assert torch.equal(plain.isnan(), out.isnan()) and plain.isnan().any()
    assert torch.equal(plain.nan_to_num(), out.nan_to_num())
    assert figures(model)["dense_calls"] == {"not finite": 4}


def test_a_causal_mask_stays_dense():
    model, call = wan(diffusers.SkyReelsV2Transformer3DModel, num_frame_per_block=3)
    call["timestep"] = call["timestep"].long()
    assert figures_after(model, call) == {}
    model, call = wan(diffusers.SkyReelsV2Transformer3DModel, num_frame_per_block=2)
    call["hidden_states"] = random(1, 4, 4, 8, 8)
    assert figures_after(model, call) == {"the mask does more than leave out padding at the end": 4}


def figures_after(model, call, recipe=None):
    plain = drive(model, call)
    out = drive(model, call, recipe or Recipe(sparse=sparse()))
    assert error(out, plain) < 1e-5
    return figures(model)["dense_calls"]


def hunyuan_video15():
    """Its own mask has S x S entries, all but the rows of padding alike."""
    torch.manual_seed(0)
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=8,
        rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v",
    )  # fmt: skip
    call = dict(
        hidden_states=random(1, 4, 3, 4, 6), timestep=torch.tensor([500.0]),
        encoder_hidden_states=random(1, 5, 16), encoder_hidden_states_2=random(1, 3, 8),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]]),
        encoder_attention_mask_2=torch.tensor([[1, 0, 0]]), image_embeds=torch.zeros(1, 4, 8),
        return_dict=False,
    )  # fmt: skip
    return tiny_pipelines.livelier(model), call


def test_hunyuan_video_15_gets_by_with_lengths(seen):
    model, call = hunyuan_video15()
    assert figures_after(model, call) == {}
    assert {geometry.valid for *_, geometry, _ in seen} == {(72 + 4,)}


def test_padding_may_change_within_a_run(seen):
    """Host code that takes turns with prompts of one length."""
    model, call = hunyuan_video15()
    shorter = call | dict(encoder_attention_mask=torch.tensor([[1, 0, 0, 0, 0]]))
    plain = [drive(model, one, steps=1) for one in (call, shorter)]
    scheduler = Scheduler(2)
    blockcache.enable(model, Recipe(sparse=sparse()), scheduler=scheduler)
    for step, one in enumerate((call, shorter)):
        scheduler.step_index = step
        with torch.no_grad():
            assert error(model(**one)[0], plain[step][0]) < 1e-5
    assert [geometry.valid for *_, geometry, _ in seen] == [(76,), (76,), (74,), (74,)]


def test_a_prompt_as_long_as_the_latents_is_not_taken_for_them(seen):
    model, call = wan()
    call["encoder_hidden_states"] = random(1, 48, 16)
    assert figures_after(model, call) == {}
    assert len(seen) == 2 * 2
    assert all(q.shape == k.shape == (1, 2, 48, 12) for _, q, k, _, _ in seen)


def test_an_exception_leaves_nothing_behind():
    model, call = wan()
    plain = drive(model, call)
    sparse_output = drive(model, call, thin())

    def fail(*_):
        raise RuntimeError("boom")

    handle = model.blocks[1].attn1.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        drive(model, call, thin())
    handle.remove()
    assert not _get_current_function_mode_stack()
    assert torch.equal(drive(model, call, thin()), sparse_output)
    blockcache.disable(model)
    assert torch.equal(drive(model, call), plain)


def test_threads_do_not_see_each_other():
    """One model enabled in two threads at once, while a third thread runs a plain model."""
    model, call = wan()
    other, other_call = wan(cross_attn_norm=False)
    plain = drive(other, other_call, steps=4)
    calls = [call, call | dict(hidden_states=random(1, 4, 3, 8, 12))]
    scheduler = Scheduler(4)
    expected = [drive(model, one, thin(), steps=4) for one in calls]
    blockcache.enable(model, thin(), scheduler=scheduler)
    results = {}

    def enabled(number):
        own = Scheduler(4)
        outputs = []
        for step in range(4):
            own.step_index = scheduler.step_index = step
            barrier.wait()
            with torch.no_grad():
                outputs.append(model(**calls[number])[0])
            barrier.wait()
        results[number] = torch.stack(outputs)

    def disabled():
        results["plain"] = []
        for _ in range(8):
            results["plain"].append(drive(other, other_call, steps=4))

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=enabled, args=(i,)) for i in range(2)]
    threads.append(threading.Thread(target=disabled))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(results[i], expected[i]) for i in range(2))
    assert all(torch.equal(one, plain) for one in results["plain"])


def test_gradients_bypass_everything(seen):
    model, call = wan()
    scheduler = Scheduler(2)
    blockcache.enable(model, Recipe(sparse=sparse()), scheduler=scheduler)
    scheduler.step_index = 0
    model(**call)[0].sum().backward()
    assert not seen
    assert all(p.grad is not None for p in model.blocks[0].attn1.to_q.parameters())


class Attending(torch.nn.Module):
    """A block that attends with the given options, on tensors changed by `change`."""

    def __init__(self, change=None, **options):
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)
        self.change, self.options = change, options

    def forward(self, hidden_states):
        q, k, v = self.qkv(hidden_states).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.change is not None:
            q, k, v = self.change(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v, **self.options)
        return hidden_states + out.transpose(1, 2).flatten(2)[..., :8].to(hidden_states.dtype)


class Stranger(torch.nn.Module):
    """A denoiser of pictures with attention of one's choice; its geometry has to be guessed."""

    def __init__(self, *args, **options):
        super().__init__()
        torch.manual_seed(0)
        self.config = type("Config", (), dict(in_channels=8, patch_size=1))()
        self.blocks = torch.nn.ModuleList(Attending(*args, **options) for _ in range(2))

    def forward(self, hidden_states, timestep=None):
        tokens = hidden_states.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return (tokens.transpose(1, 2).unflatten(2, hidden_states.shape[2:]),)


PICTURE = dict(hidden_states=random(1, 8, 6, 8))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Stranger(is_causal=True), "the attention is causal"),
        (lambda: Stranger(dropout_p=0.5), "the attention has dropout"),
        (
            lambda: Stranger(lambda q, k, v: (q, k[:, :1], v[:, :1]), enable_gqa=True),
            "queries, keys and values differ in heads (grouped queries)",
        ),
        (
            lambda: Stranger(lambda *qkv: [x.double() for x in qkv]),
            "queries, keys and values are torch.float64",
        ),
        (
            lambda: Stranger(attn_mask=torch.ones(48, 48).tril().bool()[None, None]),
            "the mask does more than leave out padding at the end",
        ),
        (
            lambda: Stranger(attn_mask=torch.zeros(1, 2, 48, 48)),
            "a mask of shape (1, 2, 48, 48) is no padding mask [B, 1, 1, S]",
        ),
    ],
)
def test_options_that_the_kernels_lack_stay_dense(build, reason):
    model = build()
    torch.manual_seed(1)
    plain = drive(model, PICTURE)
    torch.manual_seed(1)
    assert torch.equal(drive(model, PICTURE, thin()), plain)
    assert figures(model)["dense_calls"] == {reason: 4}


@pytest.mark.parametrize("options", [{}, dict(scale=0.7), dict(attn_mask=torch.zeros(1, 1, 1, 48))])
def test_options_that_the_kernels_have_are_heeded(options):
    model = Stranger(**options)
    plain = drive(model, PICTURE)
    assert error(drive(model, PICTURE, Recipe(sparse=sparse())), plain) < 1e-6
    assert figures(model)["sparse_calls"] == 4 and figures(model)["dense_calls"] == {}


def test_autocast_casts_as_the_host_would(seen):
    model = Stranger(lambda q, k, v: (q.float(), k.float(), v))
    with torch.autocast("cpu", torch.bfloat16):
        plain = drive(model, PICTURE)
        out = drive(model, PICTURE, Recipe(sparse=sparse()))
    assert {q.dtype for _, q, *_ in seen} == {torch.bfloat16}
    assert error(out, plain) < 1e-2 and figures(model)["dense_calls"] == {}


def test_inference_mode_works():
    model, call = wan()
    with torch.inference_mode():
        plain = drive(model, call)
        assert error(drive(model, call, Recipe(sparse=sparse())), plain) < 1e-5
    assert figures(model)["sparse_calls"] == 4


def test_a_backend_that_cannot_run_is_refused():
    model, call = wan()
    with pytest.raises(ValueError, match="backend='triton' was asked for"):
        drive(model, call, thin(backend="triton"))
    blockcache.enable(model, thin(backend="torch"), scheduler=Scheduler(2))
    assert error(drive(model, call, thin(backend="torch")), drive(model, call, thin())) == 0


# ---- as data -------------------------------------------------------------------------------------


def test_plans_keep_the_sparse_rule(tmp_path):
    recipe = Recipe(
        (Rule(Site("stack"), Every(2)),),
        sparse=Sparse(
            by_name("cubes", density=0.3), dense_steps=0.1, dense_layers=(2, 5), refresh=4,
            budget_mib=64.0,
        ),
    )  # fmt: skip
    model, _ = wan()
    plan = blockcache.plan_for(model, recipe, steps=8)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.recipe.sparse == recipe.sparse
    assert blockcache.plan_for(model, "cubes", steps=8).recipe.sparse == Sparse(by_name("cubes"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(dense_steps=-1), "dense_steps"),
        (dict(dense_steps=1.5), "neither a share below 1 nor a whole count"),
        (dict(dense_layers=float("nan")), "dense_layers"),
        (dict(dense_layers=(1, -1)), "dense_layers"),
        (dict(dense_layers=(0.5,)), "dense_layers"),
        (dict(dense_layers_steps=-1), "dense_layers_steps"),
        (dict(dense_layers_steps=1.5), "neither a share below 1 nor a whole count"),
        (dict(max_density=0.0), "max_density"),
        (dict(max_density=1.1), "max_density"),
        (dict(budget_mib=-1.0), "budget_mib"),
        (dict(min_length=-1), "min_length"),
        (dict(backend="cuda"), "backend"),
        (dict(densest=1), "unknown field 'densest'"),
        (dict(planner="cubes"), "planner"),
    ],
)
def test_impossible_rules_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        Sparse(**(dict(planner=by_name("cubes")) | settings))


def test_an_empty_recipe_is_refused():
    with pytest.raises(PlanError, match="at least one rule"):
        Recipe()
    with pytest.raises(PlanError, match="unknown preset or recipe 'cubism'"):
        blockcache.enable(wan()[0], "cubism")
