"""The denoiser's own output as a site: forms of outputs, payloads, and the gate on latents.

The toy takes x to 16 x + 26, see `toys`.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.plan import Cooldown, Every, Gate, MaxStreak, Taylor, Warmup
from sub_toys import SubDenoiser
from toys import Denoiser, Scheduler, branches, calls, column, drive, enable, static

MODEL = Site("model")


def plain(x):
    return 16 * x + 26


@pytest.mark.parametrize(
    ("payload", "reused"),
    [("residual", lambda x, a: x + 15 * a + 26), ("output", lambda x, a: plain(a))],
)
def test_by_hand(payload, reused):
    model = Denoiser()
    scheduler = enable(model, static(MODEL, 0, 3, total=5, payload=payload), steps=5)
    outputs = drive(model, scheduler, [1, 2, 3, 4, 7])
    assert outputs == [plain(1), reused(2, 1), reused(3, 1), plain(4), reused(7, 4)]
    assert calls(model) == [2, 2, 2, 2]
    (branch,) = branches(model)
    assert branch["map"] == [[1] * 4, [0] * 4, [0] * 4, [1] * 4, [0] * 4]
    assert (branch["computed"], branch["reused"]) == (2, 3)
    assert branch["decided"] == {"first step": 1, "reuse": 3, "MaskTable": 1}


def test_linear_extrapolation():
    model = Denoiser()
    rule = static(MODEL, 0, 1, 4, total=6, predictor=Taylor(1), payload="output")
    assert drive(model, enable(model, rule, steps=6), range(6)) == [plain(x) for x in range(6)]
    assert calls(model)[0] == 3


class Forms(nn.Module):
    """Puts its output out in a form of choice."""

    def __init__(self, form):
        super().__init__()
        self.inner = Denoiser()
        self.blocks = self.inner.blocks
        self.form = form
        self.calls = 0

    def forward(self, hidden_states, timestep=None, return_dict=True):
        self.calls += 1
        return self.form(self.inner(hidden_states), return_dict)


def diffusers_form(x, return_dict):
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def run(model, scheduler, inputs, **kwargs):
    outputs = []
    with torch.no_grad():
        for i, x in enumerate(inputs):
            scheduler.step_index = i
            outputs.append(model(column(x), timestep=scheduler.timesteps[i], **kwargs))
    return outputs


@pytest.mark.parametrize("payload", ["residual", "output"])
def test_output_classes_and_tuples(payload):
    model = Forms(diffusers_form)
    scheduler = enable(model, static(MODEL, 0, total=3, payload=payload), steps=3)
    last = 3 + 15 + 26 if payload == "residual" else plain(1)
    for return_dict, kind in ((True, Transformer2DModelOutput), (False, tuple), (True, None)):
        outputs = run(model, scheduler, [1, 2, 3], return_dict=return_dict)
        assert {type(out) for out in outputs} == {kind or Transformer2DModelOutput}
        assert outputs[2][0].item() == last
        if return_dict:
            assert outputs[2].sample is outputs[2][0]
    assert model.calls == 3


def test_several_tensors_of_different_shapes_are_all_kept():
    """Nothing is added to the input then, whatever the payload."""

    def form(x, return_dict):
        return {"list": [x, x.expand(1, 2, 1).clone()], "none": None, "number": 3}["list"], None

    model = Forms(form)
    scheduler = enable(model, static(MODEL, 0, total=2), steps=2)
    _, (tensors, nothing) = run(model, scheduler, [1, 2])
    assert [t.flatten().tolist() for t in tensors] == [[42], [42, 42]]
    assert nothing is None


@pytest.mark.parametrize("change", ["channels", "dtype"])
def test_an_output_that_cannot_be_added_to_the_input(change):
    """Twice the channels (a learned variance) or another dtype: the output itself is stored."""

    def form(x, return_dict):
        return torch.cat([x, -x], dim=1) if change == "channels" else x.to(torch.bfloat16)

    model = Forms(form)
    scheduler = enable(model, static(MODEL, 0, total=2), steps=2)
    first, second = run(model, scheduler, [1, 2])
    assert torch.equal(first, second)
    assert first.dtype == second.dtype
    assert first is not second


def test_an_output_of_unknown_kind_is_computed_and_said(caplog):
    """The old object itself, with the tensors of the old step, was handed out again."""

    @dataclass
    class Box:
        sample: torch.Tensor

    model = Forms(lambda x, return_dict: Box(x))
    scheduler = enable(model, static(MODEL, 0, total=3), steps=3)
    outputs = run(model, scheduler, [1, 2, 3])
    assert [out.sample.item() for out in outputs] == [plain(1), plain(2), plain(3)]
    assert "model: the model returns a Box" in caplog.text


def test_a_caller_that_writes_into_what_it_gets():
    """As samplers may do. Neither the stored output nor the stored input is theirs."""
    model = Denoiser()
    scheduler = enable(model, static(MODEL, 0, total=4, payload="output"), steps=4)
    with torch.no_grad():
        latents = column(1)
        for i in range(4):
            scheduler.step_index = i
            out = model(latents)
            assert out.item() == plain(1)
            out.mul_(0)
            latents.fill_(100)


def test_a_model_that_writes_into_its_input():
    model = Denoiser(in_place=True)
    scheduler = enable(model, static(MODEL, 0, 2, total=4), steps=4)
    # The residual is taken against what was passed in, not against what became of it.
    assert drive(model, scheduler, [1, 2, 3, 4]) == [42, 2 + 41, 74, 4 + 71]


def test_rules_beneath_the_model():
    """While the whole is reused the stack's and blocks' anchors stay where they are."""
    model = Denoiser()
    whole = static(MODEL, 0, 1, 3, 5, total=6, payload="output")
    stack = static(Site("stack"), 0, 1, 2, 4, total=6, predictor=Taylor(1))
    outputs = drive(model, enable(model, whole, stack, steps=6), range(6))
    # Steps 2 and 4 whole: copies of 1 and 3. Step 3, stack: the line through 0 and 1 (2 and 4 were
    # to be computed, but were not) is exact. Step 5: the same line from 0 and 1.
    assert outputs == [plain(0), plain(1), plain(1), plain(3), plain(3), plain(5)]
    assert calls(model)[0] == 2
    (branch,) = branches(model)
    assert branch["map"] == [[1] * 4, [1] * 4] + [[0] * 4] * 4


def test_two_rules_for_the_model():
    model = Denoiser()
    line = static(MODEL, 0, 1, 3, total=5, predictor=Taylor(1), payload="output")
    copy = static(MODEL, 0, 1, 2, total=5, payload="output")
    outputs = drive(model, enable(model, line, copy, steps=5), [0, 1, 5, 5, 5])
    # Step 2 by the line (2), 3 by the copy of step 1, 4 by the line (4).
    assert outputs == [plain(0), plain(1), plain(2), plain(1), plain(4)]


def test_branches_and_shapes_are_kept_apart():
    model = Denoiser()
    scheduler = enable(model, static(MODEL, 0, 2, total=4, payload="output"), steps=4)
    with torch.no_grad():
        for width in (1, 2):
            for i in range(4):
                scheduler.step_index = i
                for branch in range(2):
                    e = torch.full((1,), float(branch))
                    x = torch.full((1, width, 1), 10.0 * branch + i)
                    out = model(x, scheduler.timesteps[i], e)
                    assert out.shape == x.shape
                    assert out.flatten()[0].item() == plain(10 * branch + i // 2 * 2)


class Stop(Exception):
    pass


@pytest.mark.parametrize("step", [0, 2])
def test_after_an_exception_nothing_is_left(step):
    model = Denoiser()
    scheduler = enable(model, static(MODEL, 0, 2, total=4), steps=4)
    expected = drive(model, scheduler, [1, 2, 3, 4])

    def before(i):
        if i == step:
            model.blocks[3].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Stop))

    with pytest.raises(Stop):
        drive(model, scheduler, [50, 60, 70, 80], before)
    model.blocks[3]._forward_pre_hooks.clear()
    assert drive(model, scheduler, [1, 2, 3, 4]) == expected


# The ten pipelines.


def test_half_of_the_steps(each):
    plain = each.plain(4)
    blockcache.enable(each.pipe, Recipe((Rule(MODEL, Every(1), Taylor(1)),)))
    assert torch.equal(each.run(4), plain)
    blockcache.enable(each.pipe, Recipe((Rule(MODEL, Every(2)),)))
    with each.spy() as spy:
        cached = each.run(4)
    n = len(branches(each.pipe))
    assert spy.calls == [2 * n] * len(spy.calls)
    assert torch.equal(each.run(4), cached)
    assert 0 < (cached - plain).norm() / plain.norm() < 1.0
    assert blockcache.summary(each.pipe).as_dict()["skipped_fraction"] == 0.5
    blockcache.disable(each.pipe)
    assert torch.equal(each.run(4), plain)


def test_easy_cache(each):
    """A gate on latents: threshold 0 gives the uncached picture, a wide one reuses."""
    plain = each.plain(6)
    for threshold, is_plain in ((0.0, True), (10.0, False)):
        gate = Gate(threshold, "latent", accumulate=True)
        rule = Rule(MODEL, gate, guards=(Warmup(2), MaxStreak(2)))
        blockcache.enable(each.pipe, Recipe((rule,)))
        result = each.run(6)
        assert torch.equal(result, plain) == is_plain
        for branch in branches(each.pipe):
            computed = "".join(str(row[0]) for row in branch["map"])
            # The gain needs two computed steps, which the warm-up gives.
            assert computed == ("111111" if is_plain else "110010")
    blockcache.disable(each.pipe)
    assert torch.equal(each.run(6), plain)


# The gate on latents, by hand. Output 16 x + 26; its gain is 16 throughout, so a step's change is
# 16 |x - x before| / |last computed output|.


def latent(threshold, payload="output", guards=(), **settings):
    return Rule(MODEL, Gate(threshold, "latent", **settings), guards=guards, payload=payload)


def pattern(model, branch=0):
    return "".join(str(row[0]) for row in branches(model)[branch]["map"])


@pytest.mark.parametrize(
    ("accumulate", "expected"),
    # Computed: x = 0 (26), 1 (42). After that every step changes by 16 / 42 = .38; the sum is .76
    # in step 3, computed (74), then 16 / 74 = .22 and .43.
    [(False, "110000"), (True, "110100")],
)
def test_latent_gate_by_hand(accumulate, expected):
    model = Denoiser()
    scheduler = enable(model, latent(0.5, accumulate=accumulate), steps=6)
    outputs = drive(model, scheduler, range(6))
    assert pattern(model) == expected
    anchors = [max(j for j in range(i + 1) if expected[j] == "1") for i in range(6)]
    assert outputs == [plain(a) for a in anchors]


def test_reused_sub_layers_make_no_reused_output():
    """With sub-layers reused beneath it, the gain was not measured any more.

    One block, 24 x + 15; with attn reused from a, 12 x + 12 a + 15. Computed: 15 and 39. Step 2:
    24 / 39 = .62, computed with attn of x = 1: 51, gain 12. Step 3: 12 / 51 = .24.
    """
    model = SubDenoiser()
    scheduler = enable(model, latent(0.3), static(Site("attn"), 0, 1, total=6), steps=6)
    assert drive(model, scheduler, range(6)) == [15, 39, 51, 51, 51, 51]
    assert pattern(model) == "111000"


def test_latent_gate_with_samples_of_their_own():
    """ "any" computes when one of the batch asks; the mean of all had hidden it."""
    for batch, expected in (("any", "1111"), ("mean", "1100")):
        model = Denoiser()
        scheduler = enable(model, latent(0.2, batch=batch), steps=4)
        with torch.no_grad():
            for i in range(4):
                scheduler.step_index = i
                # The first sample hardly moves and is large, the second one moves.
                model(torch.tensor([1000.0 + i, 1.0 + i]).view(2, 1, 1))
        assert pattern(model) == expected


def test_latent_gate_with_nothing_moving_and_with_nan():
    model = Denoiser()
    scheduler = enable(model, latent(10.0), steps=5)
    # Latents that stand still give no gain: 0 / 0, computed.
    assert drive(model, scheduler, [1, 1, 1, 1, 1]) == [plain(1)] * 5
    assert pattern(model) == "11111"
    outputs = drive(model, scheduler, [1, 2, math.nan, 3, 4])
    assert math.isnan(outputs[2])
    assert outputs[3:] == [plain(3), plain(4)]
    # Zero is never below zero.
    scheduler = enable(model, latent(0.0), steps=4)
    assert drive(model, scheduler, [1, 2, 2, 2]) == [plain(x) for x in (1, 2, 2, 2)]


def test_latent_gate_guards():
    guards = (Warmup(3), Cooldown(1), MaxStreak(2))
    model = Denoiser()
    drive(model, enable(model, latent(10.0, guards=guards), steps=10), range(10))
    assert pattern(model) == "1110010011"
    assert branches(model)[0]["decided"] == {
        "first step": 1,
        "Warmup": 2,
        "MaxStreak": 2,
        "Cooldown": 1,
        "reuse": 4,
    }


class Lists(nn.Module):
    """Takes a list of pictures, and puts one out."""

    def __init__(self):
        super().__init__()
        self.inner = Denoiser()
        self.blocks = self.inner.blocks

    def forward(self, x, t):
        return (list(self.inner(torch.stack(x)).unbind()),)


def test_a_list_of_pictures():
    """Models of packed sizes take and give lists: all of them are looked at."""
    model = Lists()
    scheduler = Scheduler(4)
    blockcache.enable(model, Recipe((latent(0.2),)), scheduler=scheduler)
    with torch.no_grad():
        for i in range(4):
            scheduler.step_index = i
            x = [torch.full((1, 1), 1000.0 + i), torch.full((1, 1), 1.0 + i)]
            ((first, second),) = model(x, scheduler.timesteps[i])
            assert (first.item(), second.item()) == (plain(1000 + i), plain(1 + i))
    assert pattern(model) == "1111"


@pytest.mark.parametrize("payload", ["residual", "output"])
def test_a_picture_in_a_list_alone_and_beside_another(payload):
    """A residual was kept of a list of one, and the output of a list of two."""

    def first_of(pictures):
        model = Lists()
        scheduler = enable(model, static(MODEL, 0, 3, total=5, payload=payload), steps=5)
        found = []
        with torch.no_grad():
            for i in range(5):
                scheduler.step_index = i
                shown = [torch.full((2, 1), x + i) for x in pictures]
                found.append(model(shown, scheduler.timesteps[i])[0][0])
        return torch.stack(found)

    alone = first_of([1.0])
    assert torch.equal(alone, first_of([1.0, 50.0]))
    assert alone[:, 0, 0].tolist() == [plain(1)] * 3 + [plain(4)] * 2


# Compiled as a whole.


@pytest.fixture
def _clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_model_compiled_in_place_is_reused_as_a_whole(_clean_dynamo, caplog):
    """Blocks are out of sight then, but the model's own output is not."""
    model = Denoiser()
    model.compile(backend="eager")
    scheduler = enable(model, static(MODEL, 0, 2, total=8, payload="output"), steps=8)
    outputs = drive(model, scheduler, range(8))
    assert outputs == [plain(0)] * 2 + [plain(2)] * 6
    figures = blockcache.summary(model).as_dict()
    assert (figures["branches"][0]["computed"], figures["branches"][0]["reused"]) == (2, 6)
    assert figures["reasons"] == {}
    assert [r for r in caplog.records if r.name == "blockcache"] == []
    blockcache.disable(model)
    assert drive(model, scheduler, [3]) == [plain(3)]


def test_other_sites_of_a_model_compiled_in_place_say_so(_clean_dynamo, caplog):
    model = Denoiser()
    model.compile(backend="eager")
    rules = (static(MODEL, 0, 2, total=8, payload="output"), static(Site("stack"), 0, total=8))
    scheduler = enable(model, *rules, steps=8)
    assert drive(model, scheduler, range(8)) == [plain(0)] * 2 + [plain(2)] * 6
    assert caplog.text.count("the whole model is compiled") == 1


def two_branches(model, scheduler, steps):
    """A run in which every step calls the model for two conditionings."""
    conditionings = [column(0), column(1)]
    outputs = []
    with torch.no_grad():
        for i in range(steps):
            scheduler.step_index = i
            for text in conditionings:
                out = model(column(i), timestep=scheduler.timesteps[i], encoder_hidden_states=text)
                outputs.append(out.item())
    return outputs[::2], outputs[1::2]


def test_a_rule_for_one_branch_leaves_the_other_alone():
    model = Denoiser()
    both = static(Site("stack"), 0, 2, total=4, branch=0)
    second = static(MODEL, 0, total=4, payload="output", branch=1)
    scheduler = enable(model, both, second, steps=4)
    first, other = two_branches(model, scheduler, 4)
    assert first == [plain(0), 1 + 26, plain(2), 3 + 15 * 2 + 26]
    assert other == [plain(0)] * 4
    assert [branch["map"] for branch in branches(model)] == [
        [[1] * 4, [0] * 4, [1] * 4, [0] * 4],
        [[1] * 4, [0] * 4, [0] * 4, [0] * 4],
    ]
    assert calls(model) == [3] * 4


def test_a_rule_for_a_branch_that_is_never_called_is_said(caplog):
    model = Denoiser()
    scheduler = enable(model, static(MODEL, 0, total=3, branch=1), steps=3)
    assert drive(model, scheduler, [1, 2, 3]) == [plain(1), plain(2), plain(3)]
    assert "it is for branch 1, and a step calls the model 1 times" in caplog.text
    with pytest.raises(ValueError, match="a rule for one branch needs a static policy"):
        Rule(MODEL, Gate(0.1, signal="latent"), payload="output", branch=0)
