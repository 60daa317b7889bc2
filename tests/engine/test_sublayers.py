"""Sub-layers as sites: attention, cross-attention, MLP, transformers inside a U-Net's blocks."""

import logging

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.engine.blocks import find_blocks
from blockcache.engine.parts import find_parts
from blockcache.plan import Every, MaskTable, Taylor, even_steps
from sub_toys import Attention, Joint, Mlp, SubBlock, SubDenoiser, part_calls
from toys import Scheduler, branches, column, drive, enable, static

ATTN, CROSS, MLP = Site("attn"), Site("cross"), Site("mlp")


def plain(x, e=0.0):
    return 24 * x + 3 * e + 15


@pytest.mark.parametrize(
    ("site", "reused"),
    [
        (ATTN, lambda x, a: 12 * x + 12 * a + 15),
        (CROSS, lambda x, a: 6 * x + 18 * a + 15),
        (MLP, lambda x, a: 8 * x + 16 * a + 15),
    ],
    ids=["attn", "cross", "mlp"],
)
@pytest.mark.parametrize("payload", ["residual", "output"])
def test_one_kind_is_reused_and_nothing_else(site, reused, payload):
    """What a sub-layer puts out is stored; its input has no influence, whatever the payload."""
    model = SubDenoiser()
    scheduler = enable(model, static(site, 0, 2, total=4, payload=payload), steps=4)
    e = torch.zeros(1, 1, 1)
    outputs = drive(model, scheduler, [1, 2, 3, 5], encoder_hidden_states=e)
    assert outputs == [plain(1), reused(2, 1), plain(3), reused(5, 3)]
    counts = {"attn": 4, "cross": 4, "ff": 4}
    counts["ff" if site is MLP else site.scope] = 2
    assert part_calls(model) == counts
    (branch,) = branches(model)
    assert (branch["part_calls"], branch["part_calls_reused"]) == (4, 2)
    assert branch["decided"] == {"first step": 1, "reuse": 2, "MaskTable": 1}
    assert branch["block_calls_skipped"] == 0


def test_linear_extrapolation_of_a_sub_layer():
    """attn(x) = x + 1 is linear in x and x in the step: exact from two anchors on."""
    model = SubDenoiser()
    rule = static(ATTN, 0, 1, 4, total=6, predictor=Taylor(1))
    outputs = drive(model, enable(model, rule, steps=6), [0, 1, 2, 3, 4, 5])
    assert outputs == [plain(x) for x in range(6)]
    assert part_calls(model)["attn"] == 3


def test_all_three_kinds_with_intervals_of_their_own():
    """Three rules, three rows of anchors: attn every 2nd, cross every 3rd, mlp every 4th step."""
    model = SubDenoiser()
    rules = (Rule(ATTN, Every(2)), Rule(CROSS, Every(3)), Rule(MLP, Every(4)))
    xs = [1, 2, 4, 7, 11, 16]
    outputs = drive(model, enable(model, *rules, steps=6), xs)
    expected, kept = [], {}
    for i, x in enumerate(xs):
        for name, n, value in (("attn", 2, lambda v: v + 1), ("cross", 3, lambda v: 3 * v)):
            kept[name] = value(x) if i % n == 0 else kept[name]
            x = x + kept[name]
        kept["mlp"] = 2 * x + 3 if i % 4 == 0 else kept["mlp"]
        expected.append(x + kept["mlp"])
    assert outputs == expected
    assert part_calls(model) == {"attn": 3, "cross": 2, "ff": 2}


def test_a_mask_of_its_own_for_every_sub_layer():
    """Rows of a table are sub-layers in calling order, within the site's blocks."""
    model = SubDenoiser(3)
    rule = Rule(Site("mlp", 1), MaskTable(((0, 1, 2), (0,)), 3))
    drive(model, enable(model, rule, steps=3), [1, 1, 1])
    assert [block.ff.calls for block in model.blocks if isinstance(block, SubBlock)] == [3, 3, 1]
    assert branches(model)[0]["part_calls"] == 6
    assert branches(model)[0]["part_calls_reused"] == 2


def test_a_table_with_the_wrong_number_of_rows_is_left_out(caplog):
    model = SubDenoiser(2)
    rule = Rule(ATTN, MaskTable(((0,), (0, 1), (0, 1)), 3))
    assert drive(model, enable(model, rule, steps=3), [1, 2, 3]) == [
        plain(plain(x)) for x in [1, 2, 3]
    ]
    assert "its table has 3 rows and the model 2 attn sub-layers" in caplog.text


def test_joint_attention_keeps_both_streams():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Joint(0, 0)
            self.calls = 0

        def forward(self, hidden_states, encoder_hidden_states):
            self.calls += 1
            h, e = self.attn(hidden_states, encoder_hidden_states)
            # In place, as some models do with what is theirs.
            h += hidden_states
            e *= 10
            return h, e

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
            h, e = hidden_states, encoder_hidden_states
            for block in self.blocks:
                h, e = block(h, e)
            return torch.cat([h, e], dim=-1)

    model = Model()
    scheduler = enable(model, static(ATTN, 0, total=3), steps=3)
    with torch.no_grad():
        out = []
        for i in range(3):
            scheduler.step_index = i
            out.append(model(column(1 + 9 * i), None, column(2)).flatten().tolist())
    # attn (1, 2) = (3, 4); h = 4, e = 40; attn (4, 40) = (44, 80); h = 48, e = 800.
    # Reused at h = 10: 3 + 10 = 13, 44 + 13 = 57; at 19: 22, 66. The stored tensors stay as stored.
    assert out == [[48, 800], [57, 800], [66, 800]]
    assert [block.attn.calls for block in model.blocks] == [1, 1]


@pytest.mark.parametrize("reading", ["positional", "keyword", "rotary", "itself", "mask"])
def test_what_a_cross_attention_is(reading, caplog):
    """Attention to other tokens; not to rotary embeddings, its own tokens or a mask."""

    class Rotary(Attention):
        def forward(self, hidden_states, rotary_emb=None, attention_mask=None):
            return super().forward(hidden_states)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Rotary(1, 1) if reading in ("rotary", "mask") else Attention(1, 1)

        def forward(self, hidden_states, encoder_hidden_states):
            e = encoder_hidden_states
            calls = {
                "positional": lambda x: self.attn(x, e),
                "keyword": lambda x: self.attn(hidden_states=x, encoder_hidden_states=e),
                "rotary": lambda x: self.attn(x, e),
                "itself": lambda x: self.attn(x, x),
                "mask": lambda x: self.attn(x, attention_mask=e),
            }
            return calls[reading](hidden_states.clone())

    is_cross = reading in ("positional", "keyword")
    for site, is_it in ((CROSS, is_cross), (ATTN, not is_cross)):
        model = SubDenoiser(1, Block)
        drive(model, enable(model, static(site, 0, total=2), steps=2), [1, 2])
        assert branches(model)[0]["part_calls_reused"] == int(is_it)
    assert "sub-layer was called" in caplog.text


def test_names_of_sub_layers():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("ff", "ff_context", "img_mlp", "mlp_t2", "feed_forward", "ffn"):
                setattr(self, name, Mlp(1, 1))
            # No MLPs: norms with children, single layers, and what only sounds alike.
            for name in ("norm_ff", "ffn_norm1", "mlp_norm"):
                setattr(self, name, nn.Sequential(nn.Linear(1, 1)))
            self.proj_mlp, self.act_mlp = nn.Linear(1, 1), nn.GELU()
            self.offset = nn.Sequential(nn.Linear(1, 1))
            self.attn = Attention(1, 1)
            self.attn.add_k_proj = nn.Linear(1, 1)

    blocks = find_blocks(SubDenoiser(1, Block))
    parts = find_parts(blocks, ["attn", "mlp"])
    assert [(p.kind, p.path.removeprefix("blocks.0.")) for p in parts] == [
        ("mlp", "ff"),
        ("mlp", "ff_context"),
        ("mlp", "img_mlp"),
        ("mlp", "mlp_t2"),
        ("mlp", "feed_forward"),
        ("mlp", "ffn"),
        ("attention", "attn"),
    ]
    assert [p.number for p in parts] == list(range(7))
    assert find_parts(blocks, []) == ()


def test_a_module_that_blocks_share_is_no_part():
    """Hooks on it would be stacked, each storing the other block's calls."""
    model = SubDenoiser(2)
    model.blocks[1].ff = model.blocks[0].ff
    with pytest.raises(blockcache.PlanError, match="no 'mlp' sub-layer"):
        blockcache.enable(model, Recipe((Rule(MLP, Every(2)),)))
    scheduler = enable(model, static(ATTN, 0, total=2), steps=2)
    drive(model, scheduler, [1, 2])
    assert branches(model)[0]["part_calls_reused"] == 2
    blockcache.disable(model)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_sub_layer_called_twice_is_left_out(caplog):
    """A chunked feed-forward calls its module once per chunk; the last chunk stood for all."""

    class Chunked(SubBlock):
        def forward(self, hidden_states, encoder_hidden_states):
            x = hidden_states + self.attn(hidden_states)
            return torch.cat([self.ff(half) for half in x.chunk(2, dim=1)], dim=1)

    model = SubDenoiser(1, Chunked)
    both = (static(MLP, 0, total=3), static(ATTN, 0, total=3))
    scheduler = enable(model, *both, steps=3)
    with torch.no_grad():
        for i in range(3):
            scheduler.step_index = i
            x = torch.tensor([1.0, 10.0]).view(1, 2, 1)
            # attn: 2 x + 1 = 3, 21, kept; ff: 2 x + 3.
            assert model(x).flatten().tolist() == [9, 45]
    assert "mlp: blocks.0.ff is called more than once in a step" in caplog.text
    assert part_calls(model) == {"attn": 1, "cross": 0, "ff": 6}


def test_a_sub_layer_that_returns_an_object_of_unknown_kind_is_left_out(caplog):
    """Its tensors cannot be seen; the stored object itself was handed out again."""

    class Box:
        def __init__(self, value):
            self.value = value

    class Boxed(Mlp):
        def forward(self, x):
            return Box(super().forward(x))

    class Block(SubBlock):
        def __init__(self):
            super().__init__()
            self.ff = Boxed(2, 3)

        def forward(self, hidden_states, encoder_hidden_states):
            return hidden_states + self.ff(hidden_states).value

    model = SubDenoiser(1, Block)
    scheduler = enable(model, static(MLP, 0, total=2), steps=2)
    assert drive(model, scheduler, [1, 2]) == [6, 9]
    assert "blocks.0.ff returns a Box" in caplog.text


def test_a_sub_layer_that_writes_into_its_input_and_a_model_that_writes_into_its_output():
    class Block(SubBlock):
        def __init__(self):
            super().__init__()
            self.attn = Attention(2, 1, in_place=True)

        def forward(self, hidden_states, encoder_hidden_states):
            out = self.attn(hidden_states.clone())
            return out.mul_(10)

    model = SubDenoiser(1, Block)
    scheduler = enable(model, static(ATTN, 0, 3, total=5), steps=5)
    assert drive(model, scheduler, [1, 2, 3, 4, 5]) == [30, 30, 30, 90, 90]


# Over and inside one another.


def test_the_outer_rule_wins_and_the_inner_one_keeps_its_anchors():
    """attn is computed in steps 0, 1, 2 and 5; in step 2 the stack is reused, so its anchors stay
    0 and 1. In step 3 it extrapolates from those: attn(x) = x + 1 is linear in the step."""
    model = SubDenoiser()
    inner = static(ATTN, 0, 1, 2, 5, total=6, predictor=Taylor(1))
    outer = static(Site("stack"), 0, 1, 3, 4, 5, total=6)
    outputs = drive(model, enable(model, inner, outer, steps=6), range(6))
    # The stack's residual at x = 1 is 23 * 1 + 15 = 38.
    assert outputs == [plain(0), plain(1), 2 + 38, plain(3), plain(4), plain(5)]
    assert part_calls(model) == {"attn": 3, "cross": 5, "ff": 5}


def test_a_payload_that_only_an_outer_rule_makes_necessary_is_stored():
    """Computed in 0, 1, 2 and reused in 3: the payload of step 0 seems needless, but the stack is
    reused in 1 and 2, so it is all there is."""
    model = SubDenoiser()
    rules = (static(ATTN, 0, 1, 2, total=4), static(Site("stack"), 0, 3, total=4))
    outputs = drive(model, enable(model, *rules, steps=4), [1, 2, 3, 5])
    assert outputs[3] == 12 * 5 + 12 * 1 + 15
    assert part_calls(model)["attn"] == 1


def test_two_rules_on_one_sub_layer():
    """The earlier rule's reuse wins; both keep what is computed."""
    model = SubDenoiser()
    line = static(ATTN, 0, 1, 3, 4, total=6, predictor=Taylor(1))
    copy = static(ATTN, 0, 1, 2, 4, total=6)
    outputs = drive(model, enable(model, line, copy, steps=6), [0, 1, 4, 9, 16, 25])
    # Step 2: the line through 0 and 1 gives attn of x = 2. Step 3: a copy of step 1, the last
    # computed one. Step 5: both; the line through steps 4 (16) and 1 (1) gives 21.
    assert outputs == [
        plain(0),
        plain(1),
        12 * 4 + 12 * 2 + 15,
        12 * 9 + 12 * 1 + 15,
        plain(16),
        12 * 25 + 12 * 21 + 15,
    ]
    assert part_calls(model)["attn"] == 3
    (branch,) = branches(model)
    assert branch["part_calls_reused"] == 3


# U-Nets.


@pytest.mark.parametrize(("scope", "number"), [("transformer", 11), ("attn", 11), ("mlp", 11)])
def test_sub_layers_inside_a_unet(shared, scope, number):
    one = shared("sd15")
    plain = one.plain(4)
    blockcache.enable(one.pipe, Recipe((Rule(Site(scope), Every(2)),)))
    cached = one.run(4)
    (branch,) = branches(one.pipe)
    assert (branch["part_calls"], branch["part_calls_reused"]) == (4 * number, 2 * number)
    assert 0 < (cached - plain).norm() / plain.norm() < 0.2
    blockcache.disable(one.pipe)
    assert torch.equal(one.run(4), plain)


def test_a_transformer_inside_a_block_keeps_its_residual():
    """Reused at x = 2 from a = 1: residual 24 - 1 + 15 - ... is added to the fresh input."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer_blocks = nn.ModuleList([Mlp(3, 4)])

        def forward(self, hidden_states, encoder_hidden_states):
            return self.transformer_blocks[0](hidden_states)

    for payload, expected in (("residual", [7, 2 + 6]), ("output", [7, 7])):
        model = SubDenoiser(1, Inside)
        rule = static(Site("transformer"), 0, total=2, payload=payload)
        assert drive(model, enable(model, rule, steps=2), [1, 2]) == expected


# The whole pipelines.


SCOPES = ("attn", "cross", "mlp", "transformer")


@pytest.mark.parametrize("scope", SCOPES)
def test_computing_every_sub_layer_is_bit_identical(each, scope):
    plain = each.plain(4)
    recipe = Recipe((Rule(Site(scope), Every(1), Taylor(1)),))
    try:
        blockcache.enable(each.pipe, recipe)
    except blockcache.PlanError as error:
        assert "sub-layer was found" in str(error)
        assert scope == "transformer"
        return
    assert torch.equal(each.run(4), plain)
    assert all(branch["part_calls_reused"] == 0 for branch in branches(each.pipe))


CROSS_MODELS = {"pixart", "sd15", "wan", "ltx"}


def test_reusing_sub_layers_skips_them_and_repeats(each):
    """Of all kinds there are, every second step; counted on the modules themselves."""
    plain = each.plain(4)
    rules = tuple(Rule(site, Every(2)) for site in (ATTN, CROSS, MLP))
    found = find_parts(find_blocks(each.denoiser), ["attn", "mlp"])
    counts = [0] * len(found)

    def counting(i):
        def count(module, args):
            counts[i] += 1

        return count

    handles = [p.module.register_forward_pre_hook(counting(i)) for i, p in enumerate(found)]
    blockcache.enable(each.pipe, Recipe(rules))
    first, once = each.run(4), list(counts)
    assert torch.equal(each.run(4), first)
    for handle in handles:
        handle.remove()
    calls_per_step = len(branches(each.pipe))
    assert once == [2 * calls_per_step] * len(found)
    assert counts == [2 * n for n in once]
    assert 0 < (first - plain).norm() / plain.norm() < 0.6
    for branch in branches(each.pipe):
        assert branch["part_calls_reused"] == 2 * len(found)
    text = str(blockcache.summary(each.pipe))
    reused = 2 * len(found) * calls_per_step
    assert f"sub-layer calls reused: {reused} of {2 * reused} (50 %)" in text


def test_cross_attentions_are_told_from_the_others(each):
    blockcache.enable(each.pipe, Recipe((Rule(CROSS, Every(2)),)))
    each.run(4)
    reused = sum(branch["part_calls_reused"] for branch in branches(each.pipe))
    assert (reused > 0) == (each.name in CROSS_MODELS)


# Hygiene.


class Stop(Exception):
    pass


@pytest.mark.parametrize("call", [0, 1, 2], ids=["watched", "computed", "later"])
def test_an_exception_from_within_a_sub_layer(call):
    model = SubDenoiser()
    rules = (static(ATTN, 0, 2, total=4), static(MLP, 0, 1, 3, total=4, predictor=Taylor(1)))
    scheduler = enable(model, *rules, steps=4)
    expected = drive(model, scheduler, [1, 2, 3, 4])

    failing = model.blocks[0].cross
    calls = []

    def fail(module, args, kwargs):
        calls.append(1)
        if len(calls) == call + 1:
            raise Stop

    handle = failing.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(Stop):
        drive(model, scheduler, [100, 200, 300, 400])
    handle.remove()
    assert drive(model, scheduler, [1, 2, 3, 4]) == expected
    blockcache.disable(model)
    assert drive(model, scheduler, [1, 2]) == [plain(1), plain(2)]
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_another_shape_and_another_branch_have_cells_of_their_own():
    model = SubDenoiser()
    scheduler = enable(model, static(ATTN, 0, 2, total=4), steps=4)
    e = [torch.zeros(1, 1, 1), torch.ones(1, 1, 1)]
    with torch.no_grad():
        for width in (1, 3):
            outputs = ([], [])
            for i, x in enumerate([1.0, 2.0, 3.0, 4.0]):
                scheduler.step_index = i
                for j in range(2):
                    x_j = torch.full((1, width, 1), x + 100 * j)
                    outputs[j].append(model(x_j, None, e[j]).flatten()[0].item())
            for j, shift in enumerate((0, 100)):
                xs, anchors = [1, 2, 3, 4], [1, 1, 3, 3]
                assert outputs[j] == [
                    12 * (x + shift) + 12 * (a + shift) + 3 * j + 15
                    for x, a in zip(xs, anchors, strict=True)
                ]


def test_a_block_that_is_left_out_in_mid_run_drops_the_cells(caplog):
    model = SubDenoiser(2)
    skipping = []
    forward = type(model).forward

    class Leaving(SubDenoiser):
        def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
            kept = self.blocks
            if skipping:
                self.blocks = nn.ModuleList(kept[1:])
            try:
                return forward(self, hidden_states, timestep, encoder_hidden_states)
            finally:
                self.blocks = kept

    model.__class__ = Leaving
    scheduler = enable(model, static(ATTN, 0, total=4), steps=4)

    def before(i):
        skipping[:] = [1] if i == 2 else []

    outputs = drive(model, scheduler, [1, 1, 1, 1], before)
    assert outputs == [plain(plain(1)), plain(plain(1)), plain(1), plain(plain(1))]
    assert "did not call the same blocks" in caplog.text


def test_static_rules_read_nothing_from_the_device(monkeypatch):
    model = SubDenoiser(2)
    rules = (Rule(ATTN, Every(2), Taylor(1)), Rule(CROSS, Every(3)), Rule(Site("stack"), Every(4)))
    scheduler = enable(model, *rules, steps=10)
    counted = []
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _o=original, _n=name, **k: (counted.append(_n), _o(self, *a, **k))[1],
        )
    with torch.no_grad():
        for i in range(10):
            scheduler.step_index = i
            if i == 1:
                counted.clear()
            model(column(1.0 + i))
    assert counted == []


def test_payloads_are_freed_and_counted():
    """Cells of 1 + 2 anchors, of 8 floats each."""
    model = SubDenoiser()
    rules = (Rule(ATTN, Every(2)), Rule(MLP, Every(2), Taylor(1)))
    scheduler = enable(model, *rules, steps=7)
    with torch.no_grad():
        for i in range(7):
            scheduler.step_index = i
            model(torch.ones(1, 8, 1))
    figures = blockcache.summary(model).as_dict()
    assert figures["cache_bytes"] == 3 * 8 * 4
    runner = model._compiled_call_impl.engine
    (branch,) = runner._local.run.branches
    assert [len(cell.history) for cell in branch.cells] == [0, 0]


def test_the_words_where_no_sub_layer_is_called(caplog):
    class Unused(SubBlock):
        def forward(self, hidden_states, encoder_hidden_states):
            return 2 * hidden_states

    model = SubDenoiser(1, Unused)
    with caplog.at_level(logging.WARNING):
        drive(model, enable(model, static(ATTN, 0, total=10), steps=10), range(10))
    assert "no 'attn' sub-layer was called" in caplog.text
    assert "the run reused nothing" in caplog.text


# Compiled blocks: their sub-layers cannot be seen, and the results stay right.


@pytest.fixture
def clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs():
    """(graphs, breaks) seen since the last question."""
    seen = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    counters.clear()
    return seen


@pytest.mark.parametrize("when", ["before enabling", "after enabling", "in mid-run"])
def test_sub_layers_of_compiled_blocks(build_tiny, clean_dynamo, caplog, when):
    """One graph for each kind of block stays, as without us; nothing of it is reused."""

    def compile_all(*_):
        for blocks in (tiny.denoiser.transformer_blocks, tiny.denoiser.single_transformer_blocks):
            for block in blocks:
                block.compile(backend="eager")

    def run(**settings):
        return torch.as_tensor(tiny.generate(8, latent=True, **settings))

    def in_step_3(pipe, index, timestep, tensors):
        if index == 3:
            compile_all()
        return tensors

    tiny = build_tiny("flux", layers=2)
    plain = run()
    compile_all()
    counters.clear()
    assert torch.equal(run(), plain)
    alone = graphs()
    assert alone[1] == 0
    torch._dynamo.reset()

    tiny = build_tiny("flux", layers=2)
    rules = (Rule(ATTN, Every(2)), Rule(MLP, Every(4)))
    if when == "before enabling":
        compile_all()
    blockcache.enable(tiny.pipe, Recipe(rules))
    if when == "after enabling":
        compile_all()
    counters.clear()
    if when == "in mid-run":
        cached = run(callback_on_step_end=in_step_3)
        # Steps 0 to 3: attention of the four blocks in steps 1 and 3, and so on; from there plain.
        assert 0 < branches(tiny.pipe)[0]["part_calls_reused"] < 8 * 4
        assert (cached - plain).norm() / plain.norm() < 0.1
        assert torch.equal(run(), plain)
        graphs()
    else:
        assert torch.equal(run(), plain)
        assert graphs() == alone
    assert "inside compiled blocks none can be seen" in caplog.text
    assert branches(tiny.pipe)[0]["part_calls_reused"] == 0
    blockcache.disable(tiny.pipe)
    assert torch.equal(run(), plain)
    assert graphs()[1] == 0


@pytest.mark.parametrize("how", ["model", "leaves", "groups"])
def test_sub_layers_under_offloading_hooks(build_tiny, how):
    """A skipped sub-layer is not moved, and neither is what is inside it."""

    def offload(tiny):
        if how == "leaves":
            cpu_offload(tiny.denoiser, execution_device=torch.device("cpu"))
        elif how == "model":
            add_hook_to_module(tiny.denoiser, ModelHook())
        else:
            cpu = torch.device("cpu")
            kinds = dict(offload_type="block_level", num_blocks_per_group=2)
            tiny.denoiser.enable_group_offload(cpu, cpu, **kinds)

    rules = (Rule(ATTN, Every(2)), Rule(MLP, Every(3), Taylor(1)), Rule(Site("model"), Every(5)))
    free = build_tiny("wan")
    blockcache.enable(free.pipe, Recipe(rules))
    expected = torch.as_tensor(free.generate(6, latent=True))
    for order in ("first", "last"):
        tiny = build_tiny("wan")
        if order == "first":
            offload(tiny)
        blockcache.enable(tiny.pipe, Recipe(rules))
        if order == "last":
            offload(tiny)
        assert torch.equal(torch.as_tensor(tiny.generate(6, latent=True)), expected)
        assert branches(tiny.pipe) == branches(free.pipe)


def test_a_change_of_adapter_in_mid_run_drops_the_cells(shared, caplog):
    one = shared("flux")
    blockcache.enable(one.pipe, Recipe((Rule(ATTN, Every(8)),)))
    model = one.denoiser
    model._hf_peft_config_loaded = True
    layer = model.transformer_blocks[0].attn.to_q
    layer.scaling = {"default": 1.0}

    def change(pipe, index, timestep, tensors):
        layer.scaling = {"default": 1.0 if index < 3 else 0.5}
        return tensors

    try:
        one.run(8, callback_on_step_end=change)
    finally:
        del model._hf_peft_config_loaded, layer.scaling
    (branch,) = branches(one.pipe)
    # Steps 0 and 4 (no history) are computed, of eight attentions.
    assert branch["part_calls_reused"] == 6 * 8
    assert branch["decided"]["no history"] == 8
    assert "adapter or its scale changed" in caplog.text


# Against a second implementation: plain numbers, everything stored.


STEPS = 6


class Half(nn.Module):
    """x' = x + attn(x), x'' = x' + ff(x'), with binary fractions so that sums are exact."""

    def __init__(self):
        super().__init__()
        self.attn, self.ff = Attention(0.5, 1), Mlp(0.25, -2)
        self.calls = 0

    def forward(self, hidden_states, encoder_hidden_states):
        self.calls += 1
        x = hidden_states + self.attn(hidden_states)
        return x + self.ff(x)


class Place:
    """One thing that is reused for itself, and its history."""

    def __init__(self, rule, lo, hi, part=None):
        self.rule, self.lo, self.hi, self.part = rule, lo, hi, part
        self.wanted = rule.schedule(even_steps(STEPS), 1)[0]
        self.history = []

    def contains(self, other):
        return self.lo <= other.lo and other.hi <= self.hi

    def apart(self, other):
        return self.hi <= other.lo or other.hi <= self.lo

    def predicted(self, step, x):
        steps = [type("S", (), {"index": s}) for s, _ in self.history[: self.rule.predictor.depth]]
        at = type("S", (), {"index": step})
        weights = self.rule.predictor.weights(at, steps)
        is_residual = self.rule.payload == "residual" and self.part not in ("attn", "ff")
        base = x if is_residual else 0.0
        return base + sum(w * v for w, (_, v) in zip(weights, self.history, strict=False))

    def store(self, step, entered, left):
        is_residual = self.rule.payload == "residual" and self.part not in ("attn", "ff")
        self.history.insert(0, (step, left - entered if is_residual else left))


class Oracle:
    def __init__(self, recipe, blocks):
        self.blocks = blocks
        self.units, self.cells = [], []
        for rule in recipe.rules:
            scope = rule.site.scope
            lo, hi = rule.site.limits(blocks + 1)
            if scope == "model":
                self.cells.append(Place(rule, 0, 0, "model"))
            elif scope in ("attn", "mlp"):
                name = "ff" if scope == "mlp" else "attn"
                self.cells += [Place(rule, i, i + 1, name) for i in range(lo, min(hi, blocks))]
            elif scope == "block":
                self.units += [Place(rule, i, i + 1) for i in range(lo, hi)]
            else:
                self.units.append(Place(rule, lo, hi))

    def step(self, step, x):
        reused = []
        for unit in self.units if step else ():
            fits = all(u.apart(unit) or u.contains(unit) or unit.contains(u) for u in reused)
            if not unit.wanted[step] and fits:
                reused.append(unit)
        self.now = step
        self.reused_cells = [c for c in self.cells if step and not c.wanted[step]]
        first = x
        whole = [c for c in self.cells if c.part == "model"]
        for cell in whole:
            if cell in self.reused_cells:
                return cell.predicted(step, first)
        x = self.run_blocks(reused, x)
        for cell in whole:
            cell.store(step, first, x)
        return x

    def run_blocks(self, reused, x):
        entered, i = {}, 0
        while i < self.blocks + 1:
            for unit in self.units:
                if unit.lo == i:
                    entered[unit] = x
            over = [u for u in reused if u.lo <= i < u.hi]
            if over:
                unit = max(over, key=lambda u: u.hi - u.lo)
                x, i = unit.predicted(self.now, x), unit.hi
            else:
                x, i = self.block(i, x), i + 1
            for unit in self.units:
                whole = all(u.apart(unit) or unit.contains(u) for u in reused)
                if unit.hi == i and unit not in reused and whole:
                    unit.store(self.now, entered[unit], x)
        return x

    def block(self, i, x):
        if i == self.blocks:
            return x
        x = x + self.part(i, "attn", x, 0.5 * x + 1)
        return x + self.part(i, "ff", x, 0.25 * x - 2)

    def part(self, i, name, x, value):
        own = [c for c in self.cells if c.part == name and c.lo == i]
        for cell in own:
            if cell in self.reused_cells:
                return cell.predicted(self.now, x)
        for cell in own:
            cell.store(self.now, x, value)
        return value


@st.composite
def random_rule(draw):
    scope = draw(st.sampled_from(["attn", "mlp", "attn", "mlp", "span", "block", "stack", "model"]))
    lo = draw(st.integers(0, 2))
    hi = draw(st.integers(lo + 1, 3))
    site = Site(scope) if scope in ("stack", "model") else Site(scope, lo, hi)
    steps = tuple(sorted(draw(st.sets(st.integers(1, STEPS - 1))) | {0}))
    predictor = draw(st.sampled_from([Taylor(0), Taylor(1), Taylor(2)]))
    payload = draw(st.sampled_from(["residual", "output"]))
    return Rule(site, MaskTable((steps,), STEPS), predictor, (), payload)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(random_rule(), min_size=1, max_size=4),
    st.lists(st.integers(-8, 8), min_size=STEPS, max_size=STEPS),
)
def test_random_recipes_of_sub_layers_blocks_and_the_model(rules, inputs):
    # Blocks 0 and 1 have sub-layers; the third does nothing.
    rules = [r for r in rules if not (r.site.is_sub_layer and r.site.lo == 2)]
    if not rules:
        return
    recipe = Recipe(tuple(rules))
    model, scheduler = SubDenoiser(2, Half), Scheduler(STEPS)
    blockcache.enable(model, recipe, scheduler=scheduler)
    oracle = Oracle(recipe, 2)
    with torch.no_grad():
        for i, x in enumerate(inputs):
            scheduler.step_index = i
            value = torch.full((1, 1, 1), float(x), dtype=torch.float64)
            out = model(value, scheduler.timesteps[i]).item()
            assert out == pytest.approx(oracle.step(i, float(x)), rel=1e-9, abs=1e-9)
    blockcache.disable(model)
