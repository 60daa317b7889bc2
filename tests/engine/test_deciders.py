"""Online rules beyond the first-block gate: by hand on toys, and their common duties on a real
transformer. The toy takes x to 16 x + 26, its first three blocks to 8 x + 11, see `toys`."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.plan import (
    Codebook,
    Cooldown,
    Gate,
    Hermite,
    MaxStreak,
    ProbeRatio,
    Ranked,
    Taylor,
    Verified,
    Warmup,
    even_steps,
)
from sub_toys import SubDenoiser
from toys import Block, Denoiser, Scheduler, branches, calls, column, drive, enable, static

FRONT, REST, LAST = Site("span", 0, -1), Site("span", 1), Site("span", -1)


def plain(x):
    return 16 * x + 26


def pattern(model, block=-1, branch=0):
    """1 where the block was computed, per step."""
    return "".join(str(row[block]) for row in branches(model)[branch]["map"])


# Verified. Reused from a: 2 x + 14 a + 26. The forecast of the last block's output is a copy of the
# one at a, 16 a + 26, so the error is 2 |x - a| / (16 a + 26).


def verified(threshold=0.5, least=1, most=9, **rule):
    return Rule(FRONT, Verified(threshold, 1.0, 0.0, least, most), **rule)


def test_a_rejected_forecast_computes_the_step_exactly():
    model = Denoiser()
    scheduler = enable(model, verified(), steps=6)
    # Step 1 is not looked at (least), 2: 0, 3: 2 * 21 / 42 = 1: rejected, 5: 2 / 378.
    outputs = drive(model, scheduler, [1, 1, 1, 22, 22, 23])
    assert outputs == [42, 42, 42, plain(22), plain(22), 2 * 23 + 14 * 22 + 26]
    (branch,) = branches(model)
    assert branch["decided"] == {"first step": 1, "reuse": 4, "forecast rejected": 1}
    assert pattern(model, 0) == "100100"
    assert (branch["computed"], branch["block_calls"], branch["block_calls_skipped"]) == (2, 24, 12)
    # The last block ran once more for the forecast that was rejected.
    assert calls(model) == [2, 2, 2, 7]


def test_a_line_is_forecast_exactly_and_never_rejected():
    model = Denoiser()
    rule = verified(0.001, most=3, predictor=Taylor(1))
    outputs = drive(model, enable(model, rule, steps=9), range(9))
    # Step 1 copies, unseen; 2 is looked at against the only anchor and computed.
    assert outputs == [plain(0), 2 + 26, *(plain(x) for x in range(2, 9))]
    assert pattern(model, 0) == "101000100"
    assert branches(model)[0]["decided"]["longest streak"] == 1


def test_nan_is_rejected():
    model = Denoiser()
    outputs = drive(model, enable(model, verified(), steps=5), [1, 1, math.nan, 1, 1])
    assert math.isnan(outputs[2])
    assert outputs[:2] == [42, 42]
    # What was computed from NaN says nothing; step 3 is unseen, 4 is rejected.
    assert outputs[4] == 42
    assert pattern(model, 0) == "10101"


def test_a_rejection_overrules_reused_sub_layers():
    """24 x + 15 with one block; attn was to be reused throughout, but the step is exact."""
    model = SubDenoiser()
    attn = static(Site("attn"), 0, total=5)
    scheduler = enable(model, attn, verified(0.1), steps=5)
    outputs = drive(model, scheduler, [1, 1, 10, 10, 10])
    assert outputs == [39, 39, 255, 10 + 23 * 10 + 15, 255]
    (branch,) = branches(model)
    assert branch["part_calls_reused"] == 0
    assert branch["decided"] == {"first step": 2, "reuse": 6, "forecast rejected": 2}


@pytest.mark.parametrize("how", ["joint", "leader", "independent"])
def test_a_rejection_overrules_gates(how):
    """Inside the verified span a gate reuses block 1; it decided anew in the step's second try."""
    model = Denoiser()
    gate = Rule(Site("span", 1, 2), Gate(10.0))
    scheduler = enable(model, verified(), gate, steps=4, branches=how)
    outputs = drive(model, scheduler, [1, 1, 22, 22])
    assert outputs == [42, 42, plain(22), plain(22)]
    assert pattern(model, 1) == "1010"


def test_a_step_that_is_tried_twice_leaves_one_anchor():
    """The last block stored its payload in both tries: two anchors at one step, a division by 0."""
    model = Denoiser()
    last = static(LAST, 0, 1, 2, 3, total=5, predictor=Hermite(2))
    outputs = drive(model, enable(model, verified(), last, steps=5), [1, 1, 22, 22, 22])
    assert outputs[2] == plain(22)
    # Last block, y -> 2 y + 4 with residual y + 4; y = 8 x + 11 in steps 0 to 3 as x stood still
    # but for the leap. Step 4: anchors 3, 2, 1 with y = 187, 187, 19.
    weights = Hermite(2).weights(*_steps(4, [3, 2, 1], 5))
    payload = sum(w * (y + 4) for w, y in zip(weights, [187, 187, 19], strict=True))
    assert outputs[4] == pytest.approx(187 + payload)


def _steps(at, anchors, total):
    made = even_steps(total)
    return made[at], [made[i] for i in anchors]


def test_other_branches_follow_a_rejection():
    model = Denoiser()
    scheduler = enable(model, verified(), steps=4)
    conditioning = (torch.zeros(1), torch.ones(1))
    outputs = ([], [])
    with torch.no_grad():
        for i, x in enumerate([1.0, 1.0, 22.0, 22.0]):
            scheduler.step_index = i
            for j in range(2):
                out = model(column(x + j), scheduler.timesteps[i], conditioning[j])
                outputs[j].append(out.item())
    assert outputs[0] == [plain(1), plain(1), plain(22), plain(22)]
    assert outputs[1] == [plain(2), plain(2), plain(23), plain(23)]
    assert pattern(model, 0, 0) == pattern(model, 0, 1) == "1010"
    assert branches(model)[1]["decided"]["forecast rejected"] == 1


def test_the_first_call_of_a_step_verifies_whichever_branch_it_is():
    """After a change of size in mid-run the first branch ever seen is not called any more; its
    successor trusted every forecast."""
    model = Denoiser()
    scheduler = enable(model, verified(), steps=8)
    outputs = []
    with torch.no_grad():
        for i, x in enumerate([1.0] * 6 + [22.0] * 2):
            scheduler.step_index = i
            size = 2 if i < 3 else 1
            outputs.append(model(torch.full((size, 1, 1), x)).flatten()[0].item())
    assert outputs[6] == plain(22)
    assert pattern(model, 0, 1) == "10010"


# Codebook.


def test_codebook_by_hand():
    """Block 0's residual is x + 1. Change per step below .1: 4 steps, below .5: 2, else 1."""
    model = Denoiser()
    rule = Rule(Site("stack"), Codebook(((0.1, 4), (0.5, 2)), block=0.1))
    # Step 0; 1: 0 -> due 5. 5: residual 2 to 4 in 4 steps = .25 -> due 7. 7: 4 to 12: 2 / 2 = 1.
    xs = [1, 1, 9, 9, 9, 3, 5, 11, 11]
    drive(model, enable(model, rule, steps=9), xs)
    assert pattern(model) == "110001011"
    assert branches(model)[0]["decided"] == {"first step": 1, "interval": 4, "reuse": 4}
    change = branches(model)[0]["change"]
    assert (change["min"], change["median"], change["max"]) == (0.0, 0.25, 1.0)


def test_codebook_looks_only_at_computed_steps():
    """A block in front of the site also runs while it is reused; the date moved on for ever."""
    model = Denoiser()
    rule = Rule(REST, Codebook(((10.0, 3),), block=0.1))
    drive(model, enable(model, rule, steps=8), [1.0] * 8)
    assert pattern(model) == "11001001"
    assert pattern(model, 0) == "1" * 8


# Ranked.


def test_ranked_by_hand():
    """Payloads of one number are alike (1) or opposite (-1). Blocks get x, 2 x + 1, 4 x + 4, 8 x +
    11 and add x + 1, 2 x + 3, 4 x + 7, 8 x + 15: from x = 1 to x = -2 the first turns to -1, the
    second to -1, the third to -1, the last to -1; from 1 to -1.25: -.25, .5, 2, 5."""
    model = Denoiser()
    rule = Rule(Site("block"), Ranked(4, (1.0,), 0.25), Taylor(1))
    # Full in steps 0, 1 (only one anchor so far), 4, then the one least alike of four.
    drive(model, enable(model, rule, steps=6), [1, -1.25, 1, 1, 1, 1])
    assert [pattern(model, block) for block in range(4)] == ["111111", "110010", "110010", "110010"]


def test_ranked_keeps_to_the_longest_streak_of_any_unit():
    """The first unit is computed in every step; its streak stood for all."""
    model = Denoiser()
    rule = Rule(Site("block"), Ranked(100, (1.0,), 0.25), Taylor(1), (MaxStreak(2),))
    drive(model, enable(model, rule, steps=8), [1.0] * 8)
    assert [pattern(model, block) for block in range(2)] == ["11111111", "11001001"]


def test_ranked_where_a_block_is_left_out(caplog):
    """Rows count all blocks of the site, also one that is left out."""

    class Aside(Block):
        def forward(self, hidden_states):
            out = super().forward(hidden_states)
            return out, out.flatten() + 1

    class Model(Denoiser):
        def __init__(self):
            super().__init__()
            self.blocks[0] = Aside(1.0)

        def forward(self, hidden_states, timestep=None):
            for block in self.blocks:
                out = block(hidden_states)
                hidden_states = out[0] if isinstance(out, tuple) else out
            return hidden_states

    model = Model()
    rule = Rule(Site("block"), Ranked(100, (1.0,), 0.3), Taylor(1))
    drive(model, enable(model, rule, steps=4), [1, -1.75, 1, 1])
    # Residuals of the blocks 1 to 3: 2 x + 3 = 5, -.5; 4 x + 7 = 11, 0; 8 x + 15 = 23, 1: block 1.
    assert [pattern(model, block) for block in range(4)] == ["1111", "1111", "1100", "1100"]
    assert "returns tensors that are no streams" in caplog.text


# Gates that look at what enters.


class Timed(Block):
    """`2 x + c`, with a time embedding that does not matter."""

    def forward(self, hidden_states, temb):
        return super().forward(hidden_states)


class TimedDenoiser(Denoiser):
    """Passes its timestep on as the embedding; the last block spoils it."""

    def __init__(self):
        super().__init__(0)
        self.blocks = nn.ModuleList(Timed(i + 1.0) for i in range(4))

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
        temb = timestep.clone().view(1, 1)
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        temb.zero_()
        return hidden_states


def modulated(site=None, threshold=0.3, **settings):
    settings = {"reference": "previous", "accumulate": True, **settings}
    return Rule(site or Site("stack"), Gate(threshold, "modulated", **settings))


def test_time_embedding_by_hand():
    """Timesteps 1000, 900, ... 100: changes .1, .11, .125, .143, .167, .2, .25, .33, .5; the
    embedding is copied, for the model writes into it."""
    model = TimedDenoiser()
    drive(model, enable(model, modulated(), steps=10), range(10))
    # Sums: .1, .21, .336 (3); .143, .310 (5); .2, .45 (7); .33 (8); .5 (9).
    assert pattern(model) == "1001010111"


def test_a_gate_inside_a_reused_rule_is_not_asked():
    """What flows inside a skipped span is not filled in: the gate compared garbage."""
    model = TimedDenoiser()
    stack = static(Site("stack"), 0, 1, 3, 5, total=6)
    inner = modulated(Site("span", 2), 10.0)
    drive(model, enable(model, stack, inner, steps=6), range(6))
    decided = branches(model)[0]["decided"]
    # Asked in steps 1, 3, 5 only.
    assert decided == {"first step": 2, "reuse": 2 + 3, "MaskTable": 3}
    assert pattern(model, 0) == "110101"
    assert pattern(model, 3) == "100000"


def test_a_probe_that_ends_inside_a_reused_span_is_not_looked_at():
    """The probe is blocks 0 and 1; blocks 1 and 2 are skipped, so block 1 puts nothing out."""
    model = Denoiser()
    span = static(Site("span", 1, 3), 0, 2, total=5)
    gate = Rule(Site("span", 2), Gate(10.0))
    outputs = drive(model, enable(model, gate, span, steps=5), [1.0] * 5)
    assert outputs == [42] * 5
    # Steps 1, 3, 4: the span, and the gate keeps out. Step 2: the gate, behind its probe.
    assert pattern(model, 3) == "11011"
    assert pattern(model, 1) == "10100"


# ProbeRatio. Block 0 is the probe with residual x + 1; the rest adds 14 x + 25.


def test_probe_ratio_by_hand():
    model = Denoiser()
    rule = Rule(
        REST, Gate(0.3, "probe", "previous", True), ProbeRatio(0.0, 9.0), (Warmup(2), Cooldown(1))
    )
    outputs = drive(model, enable(model, rule, steps=5), [1, 2, 2.5, 4, 4])
    # Step 2: g = |3.5 - 2| / |3 - 2| = 1.5; payload 39 + 1.5 (53 - 39) = 60 = 14 * 2.5 + 25.
    # The probe's output 2 x + 1 goes 5, 6 (.2), 9 (.5: computed).
    assert outputs == [plain(1), plain(2), plain(2.5), plain(4), plain(4)]
    assert pattern(model) == "11011"


@pytest.mark.parametrize(("least", "most", "g"), [(1.0, 1.25, 1.25), (2.0, 3.0, 2.0)])
def test_probe_ratio_is_held_between_its_limits(least, most, g):
    model = Denoiser()
    rule = Rule(REST, Gate(10.0, "probe"), ProbeRatio(least, most), (Warmup(2),))
    outputs = drive(model, enable(model, rule, steps=3), [1, 2, 2.5])
    assert outputs[2] == pytest.approx(6 + 39 + g * 14)


def test_probe_ratio_where_the_anchors_agree():
    model = Denoiser()
    rule = Rule(REST, Gate(10.0, "probe"), ProbeRatio(), (Warmup(2),))
    assert drive(model, enable(model, rule, steps=3), [1, 1, 1]) == [42] * 3


def test_a_gate_that_is_asleep_keeps_its_reference():
    """A static rule reuses the very site: the gate's reference must not part from its payload."""
    model = Denoiser()
    fixed = static(REST, 0, 1, 3, total=4)
    gate = Rule(REST, Gate(0.3))
    # Residual x + 1 = 2, 2, (3), 2.5. Step 2 is the static rule's; step 3 compares 2.5 with 2.
    outputs = drive(model, enable(model, fixed, gate, steps=4), [1, 1, 2, 1.5])
    assert outputs == [42, 42, 2 * 2 + 1 + 39, 2 * 1.5 + 1 + 39]


# On a real transformer.


class Flux:
    """A tiny Flux called in a loop of its own, with latents that drift slowly."""

    def __init__(self, model, steps=10, batch=1):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(steps, batch, 16, 16, generator=generator)
        noise[1:] *= 0.05
        self.latents = noise.cumsum(0)
        self.model, self.steps, self.scheduler = model, steps, Scheduler(steps)
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        self.inputs = {
            "pooled_projections": torch.randn(batch, 32, generator=generator),
            "img_ids": ids,
            "txt_ids": torch.zeros(4, 3),
            "guidance": torch.full((batch,), 3.5),
            "return_dict": False,
        }
        self.text = [torch.randn(batch, 4, 32, generator=generator) for _ in range(2)]

    @torch.no_grad()
    def run(self, calls_per_step=1, before=lambda: None):
        """The outputs, after calling `before` at every step."""
        outputs = []
        for i in range(self.steps):
            self.scheduler.step_index = i
            before()
            for j in range(calls_per_step):
                time = self.scheduler.timesteps[i][None] / 1000
                outputs.append(
                    self.model(
                        hidden_states=self.latents[i],
                        timestep=time,
                        encoder_hidden_states=self.text[j],
                        **self.inputs,
                    )[0]
                )
        return torch.stack(outputs)


ONLINE = {
    "first_block": lambda g: Rule(REST, Gate(9.0), Taylor(1), g),
    "sample": lambda g: Rule(REST, Gate(9.0, batch="sample"), guards=g),
    "mean": lambda g: Rule(REST, Gate(9.0, batch="mean", accumulate=True), guards=g),
    "probe": lambda g: Rule(REST, Gate(9.0, "probe", "previous", True), ProbeRatio(), g),
    "modulated": lambda g: Rule(Site("stack"), Gate(9.0, "modulated", "previous", True), guards=g),
    "filtered": lambda g: Rule(Site("stack"), Gate(9.0, "filtered", "previous", True), guards=g),
    "latent": lambda g: Rule(Site("model"), Gate(9.0, "latent", accumulate=True), guards=g),
    "codebook": lambda g: Rule(Site("stack"), Codebook(((9.0, 9),)), guards=g),
    "verified": lambda g: Rule(FRONT, Verified(9.0, 1.0, 0.0, 1, 9), Taylor(1), g),
    "ranked": lambda g: Rule(Site("block"), Ranked(99, (0.0,), 0.0), Taylor(1), g),
}
GUARDS = (Warmup(2), MaxStreak(2), Cooldown(1))


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside sub-layers"])
def test_guards_hold_for_every_online_rule(shared, kind, beside):
    flux = Flux(shared("flux").denoiser)
    rules = (ONLINE[kind](GUARDS), *([static(Site("attn"), 0, 1, 5, total=10)] if beside else ()))
    blockcache.enable(flux.model, Recipe(rules), scheduler=flux.scheduler)
    flux.run()
    # Block 1 is in every site.
    assert pattern(flux.model, 1) == "1100100101"
    (branch,) = branches(flux.model)
    assert branch["part_calls_reused"] > 0 or not beside


@pytest.mark.parametrize("kind", ONLINE)
def test_everything_forced_is_bit_identical(shared, kind):
    flux = Flux(shared("flux").denoiser)
    plain = flux.run()
    blockcache.enable(flux.model, Recipe((ONLINE[kind]((Warmup(10),)),)), scheduler=flux.scheduler)
    assert torch.equal(flux.run(), plain)
    blockcache.disable(flux.model)
    assert torch.equal(flux.run(), plain)


ZERO = {
    **{s: Rule(REST, Gate(0.0, s)) for s in ("first_block", "probe")},
    **{s: Rule(Site("stack"), Gate(0.0, s)) for s in ("modulated", "filtered")},
    "latent": Rule(Site("model"), Gate(0.0, "latent")),
    "codebook": Rule(Site("stack"), Codebook(((0.0, 9),))),
    "ranked": Rule(Site("block"), Ranked(1), Taylor(1)),
    "ranked all": Rule(Site("block"), Ranked(5, (1.0,), 1.0), Taylor(1)),
}


@pytest.mark.parametrize("kind", ZERO)
def test_zero_thresholds_are_bit_identical_and_say_that_nothing_was_reused(shared, kind, caplog):
    flux = Flux(shared("flux").denoiser)
    plain = flux.run()
    blockcache.enable(flux.model, Recipe((ZERO[kind],)), scheduler=flux.scheduler)
    assert torch.equal(flux.run(), plain)
    (said,) = [r.getMessage() for r in caplog.records if "reused nothing" in r.getMessage()]
    if kind == "codebook":
        assert "the table reuses below 0 per step" in said
    elif kind.startswith("ranked"):
        assert "Ranked had nothing to compare; decided by" in said
    else:
        assert "threshold 0; a threshold of" in said


def test_the_words_for_rejected_forecasts(caplog):
    model = Denoiser()
    rule = Rule(FRONT, Verified(0.001, 1.0, 0.0, 1, 1), guards=(Warmup(1),))
    # Every step that may be reused at all comes right after a computed one and is not looked at.
    drive(model, enable(model, rule, steps=4), [1, 2, 4, 8])
    assert "reused nothing" not in caplog.text


def test_the_words_where_a_signal_is_not_found(caplog):
    model = Denoiser()
    drive(model, enable(model, modulated(), steps=8), range(8))
    assert "signal 'modulated' had nothing to compare; decided by no history 7x" in caplog.text


def test_the_words_count_rescaled_changes(caplog):
    model = Denoiser()
    rule = Rule(REST, Gate(0.5, rescale=(10.0, 0.0)))
    drive(model, enable(model, rule, steps=8), [2.0**i - 1 for i in range(8)])
    assert "changes seen 10 / 10 / 10 (min / median / max), threshold 0.5" in caplog.text


READERS = ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "nonzero")


@pytest.fixture
def reads(monkeypatch):
    counted = Counter()
    for name in READERS:
        original = getattr(torch.Tensor, name)

        def counting(self, *args, _name=name, _original=original, **kwargs):
            counted[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    return counted


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("how", ["joint", "independent"])
def test_at_most_one_read_a_step(shared, reads, kind, how):
    """Over what the model reads itself; "independent": one for each branch."""
    flux = Flux(shared("flux").denoiser, batch=2)

    def per_step():
        counts = []
        flux.run(2, lambda: (counts.append(sum(reads.values())), reads.clear()))
        return [*counts[1:], sum(reads.values())]

    reads.clear()
    plain = per_step()
    rules = (ONLINE[kind]((MaxStreak(3),)), static(Site("mlp"), 0, 4, 8, total=10))
    blockcache.enable(flux.model, Recipe(rules, how), scheduler=flux.scheduler)
    reads.clear()
    ours = [a - b for a, b in zip(per_step(), plain, strict=True)]
    assert max(ours[1:]) <= (1 if how == "joint" else 2)
    assert any(branch["reused"] for branch in branches(flux.model))


@pytest.mark.parametrize("kind", ONLINE)
def test_runs_repeat_and_leave_nothing_behind(shared, kind):
    """Two runs alike, with exceptions in between; tensors are let go of at the end."""
    flux = Flux(shared("flux").denoiser)
    blockcache.enable(flux.model, Recipe((ONLINE[kind](()),)), scheduler=flux.scheduler)
    first, decided = flux.run(2), [b["decided"] for b in branches(flux.model)]
    seen = []

    def stop():
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flux.run(2, stop)
    handle = flux.model.single_transformer_blocks[-1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(ZeroDivisionError)
    )
    with pytest.raises(ZeroDivisionError):
        flux.run(2)
    handle.remove()
    assert torch.equal(flux.run(2), first)
    assert [b["decided"] for b in branches(flux.model)] == decided
    run = flux.model._compiled_call_impl.engine._local.run
    for branch in run.branches:
        assert [t for decider in branch.deciders for t in decider.tensors()] == []
        assert all(not part.history for part in branch.reusables)


def test_two_experts_in_turn():
    """Wan 2.2: the second expert starts in mid-run, and its first step is computed."""

    class Pipe:
        def __init__(self):
            self.transformer, self.transformer_2 = Denoiser(), Denoiser()
            self.scheduler = Scheduler(8)

        @torch.no_grad()
        def __call__(self, xs):
            self.scheduler.set_timesteps(8)
            outputs = []
            for i, x in enumerate(xs):
                self.scheduler.step_index = i
                expert = self.transformer if i < 4 else self.transformer_2
                outputs.append(expert(column(x), self.scheduler.timesteps[i]).item())
            return outputs

    for rule, reused in (
        (Rule(REST, Gate(9.0)), lambda x, a: 2 * x + 1 + 14 * a + 25),
        (Rule(Site("stack"), Codebook(((9.0, 9),), 0.1)), lambda x, a: x + 15 * a + 26),
        (verified(9.0), lambda x, a: 2 * x + 14 * a + 26),
    ):
        pipe = Pipe()
        blockcache.enable(pipe, Recipe((rule,)))
        expected = []
        for x in range(8):
            anchor = x - x % 4
            if isinstance(rule.policy, Codebook):
                # It compares two computed steps before it sets a date.
                anchor += x % 4 > 0
            expected.append(reused(x, anchor))
        assert pipe(range(8)) == expected
        assert pipe(range(8)) == expected


def test_an_entry_late_into_the_schedule():
    """Image-to-image: the run is what is left of the schedule, and guards count from there."""
    model, scheduler = Denoiser(), Scheduler(10)
    rule = Rule(REST, Gate(9.0), guards=(Warmup(2), Cooldown(1)))
    blockcache.enable(model, Recipe((rule,)), scheduler=scheduler)
    scheduler.begin_index = 4
    with torch.no_grad():
        for i in range(4, 10):
            scheduler.step_index = None if i == 4 else i
            model(column(1.0), scheduler.timesteps[i])
    assert pattern(model) == "110001"
