"""Reuse on toy denoisers, every number worked out by hand.

The toy takes x to 16 x + 26; driven with x = step number it gives 26, 42, 58, ... uncached.
"""

from typing import NamedTuple

import pytest
import torch

import blockcache
from blockcache import Site
from blockcache.plan import Cooldown, Every, Rule, Taylor, Warmup
from toys import (
    Denoiser,
    Joined,
    Pairs,
    Scheduler,
    branches,
    calls,
    drive,
    enable,
    static,
    table,
)

STEPS = range(10)
PLAIN = [16.0 * x + 26 for x in STEPS]


def counts(model):
    """(computed, reused, block calls, skipped block calls) of the first branch."""
    first = branches(model)[0]
    return tuple(first[k] for k in ("computed", "reused", "block_calls", "block_calls_skipped"))


def test_the_toy_itself():
    model = Denoiser()
    assert drive(model, Scheduler(), STEPS) == PLAIN
    assert calls(model) == [10] * 4


def test_stack_residual_is_added_to_the_fresh_input():
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), 0, 1, 5))
    # Residuals 26, 41 and 101 were computed at steps 0, 1 and 5.
    expected = [26, 42, 43, 44, 45, 106, 107, 108, 109, 110]
    assert drive(model, scheduler, STEPS) == expected
    assert calls(model) == [3] * 4
    assert counts(model) == (3, 7, 40, 28)
    assert branches(model)[0]["decided"] == {"first step": 1, "MaskTable": 2, "reuse": 7}
    assert blockcache.summary(model).as_dict()["skipped_fraction"] == 0.7


def test_stack_output_ignores_the_fresh_input():
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), 0, 1, 5, payload="output"))
    assert drive(model, scheduler, STEPS) == [26, 42, 42, 42, 42, 106, 106, 106, 106, 106]
    assert calls(model) == [3] * 4


def test_taylor_of_first_order():
    """Inputs x = step squared, residual 15 x + 26. From 26 and 41 at steps 0 and 1 the line gives
    56 and 71 at 2 and 3; from 41 and 266 at 1 and 4 it gives 341 and 416 at 5 and 6."""
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), 0, 1, 4, total=7, predictor=Taylor(1)), steps=7)
    expected = [26, 42, 4 + 56, 9 + 71, 16 + 266, 25 + 341, 36 + 416]
    assert drive(model, scheduler, [i * i for i in range(7)]) == pytest.approx(expected, rel=1e-6)


def test_taylor_of_second_order_is_exact_on_a_parabola_at_uneven_gaps():
    model = Denoiser()
    rule = static(Site("stack"), 0, 1, 4, total=9, predictor=Taylor(2))
    scheduler = enable(model, rule, steps=9)
    squares = [i * i for i in range(9)]
    outputs = drive(model, scheduler, squares)
    exact = [16.0 * x + 26 for x in squares]
    assert outputs[4:] == pytest.approx(exact[4:], rel=1e-6)
    # Two anchors only: the line through 26 and 41.
    assert outputs[:4] == [26, 42, 60, 80]


def test_taylor_of_order_zero_is_a_copy():
    model, twin = Denoiser(), Denoiser()
    first = drive(model, enable(model, static(Site("stack"), 0, 1, 5)), STEPS)
    rule = static(Site("stack"), 0, 1, 5, predictor=Taylor(0))
    assert drive(twin, enable(twin, rule), STEPS) == first


def test_a_span_in_the_middle():
    model = Denoiser()
    scheduler = enable(model, static(Site("span", 1, 3), 0, 1, 5))
    # The span's residual is 16 at step 1 (3 -> 19); block 0 gives 2x+1, block 3 doubles and adds 4.
    expected = [26, 42, 46, 50, 54, 106, 110, 114, 118, 122]
    assert drive(model, scheduler, STEPS) == expected
    assert calls(model) == [10, 3, 3, 10]
    assert counts(model) == (3, 7, 40, 14)
    assert (
        branches(model)[0]["map"]
        == [[1] * 4] * 2 + [[1, 0, 0, 1]] * 3 + [[1] * 4] + [[1, 0, 0, 1]] * 4
    )


def test_blocks_each_for_itself_with_a_row_each():
    model = Denoiser()
    rows = ((0, 1, 2, 3), (0, 1), (0, 1), (0, 1, 3))
    rule = Rule(Site("block"), type(table(0))(rows, 4))
    scheduler = enable(model, rule, steps=4)
    # Step 2: block 0 gives 5, then the residuals 5, 11, 23 of step 1. Step 3: 7 + 5 + 11, and
    # block 3 doubles 23 and adds 4.
    assert drive(model, scheduler, range(4)) == [26, 42, 44, 50]
    assert calls(model) == [4, 2, 2, 3]
    # A step counts as reused if anything in it was.
    assert counts(model) == (2, 2, 16, 5)


def test_a_part_of_the_blocks_each_for_itself():
    model = Denoiser()
    scheduler = enable(model, static(Site("block", 2, 4), 0, 2, total=4), steps=4)
    # Step 1: 1 -> 3 -> 8, plus the residuals of step 0 (7 at 4 -> 11, 15 at 11 -> 26).
    # Step 2 is computed: residuals 13 and 27 (10 -> ... 5, 12, 27, 58 -> 15, 31).
    assert drive(model, scheduler, range(4)) == [26, 8 + 7 + 15, 58, 16 + 15 + 31]
    assert calls(model) == [4, 4, 2, 2]


def test_guards_and_reasons():
    model = Denoiser()
    rule = Rule(Site("stack"), Every(10), guards=(Warmup(2), Cooldown(1)))
    scheduler = enable(model, rule)
    expected = [26, 42, *(x + 41 for x in range(2, 9)), 170]
    assert drive(model, scheduler, STEPS) == expected
    assert branches(model)[0]["decided"] == {
        "first step": 1,
        "Warmup": 1,
        "Cooldown": 1,
        "reuse": 7,
    }


# Rules over one another.


def test_where_two_rules_reuse_the_wider_one_is_used():
    model = Denoiser()
    outer = static(Site("stack"), 0, 1, 3, total=4)
    inner = static(Site("span", 1, 3), 0, 1, 3, total=4)
    scheduler = enable(model, inner, outer, steps=4)
    assert drive(model, scheduler, range(4)) == [26, 42, 43, 74]
    assert calls(model) == [3] * 4


@pytest.mark.parametrize(
    ("inner", "expected", "expected_calls"),
    [
        # Step 2, outer computed, inner reused with its residual of step 0:
        # span 0..2: 0 -> 1 -> 4, so 2 + 4 = 6 -> 15 -> 34; the outer residual is then 32.
        (Site("span", 0, 2), [26, 27, 34, 35], [1, 1, 2, 2]),
        # span 2..4: 4 -> 11 -> 26, so 22; 2 -> 5 -> 12 -> 34.
        (Site("span", 2, 4), [26, 27, 34, 35], [2, 2, 1, 1]),
        # span 1..3: 1 -> 4 -> 11, so 10; 2 -> 5 -> 15 -> 34.
        (Site("span", 1, 3), [26, 27, 34, 35], [2, 1, 1, 2]),
    ],
    ids=["front", "back", "middle"],
)
def test_an_inner_rule_is_reused_while_the_outer_one_is_computed(inner, expected, expected_calls):
    """Sharing an end with the outer rule raised KeyError, or lost the outer rule's payload."""
    model = Denoiser()
    outer = static(Site("stack"), 0, 2, total=4)
    scheduler = enable(model, outer, static(inner, 0, total=4), steps=4)
    assert drive(model, scheduler, range(4)) == expected
    assert calls(model) == expected_calls


def test_overlapping_rules_take_turns():
    """Neither contains the other. A payload that a later step reuses must be kept even where the
    rule's own table has a computed step in between that never gives one."""
    model = Denoiser()
    front = static(Site("span", 0, 3), 0, 1, 2, 4, 5, total=6)
    back = static(Site("span", 2, 4), 0, 1, 2, 3, 5, total=6)
    scheduler = enable(model, front, back, steps=6)
    # Step 3: front residual of step 2 is 27 - 2 = 25, so 28 -> 60. Back got no true input there.
    # Step 4: 4 -> 9 -> 20, plus the back residual of step 2, 58 - 12 = 46.
    assert drive(model, scheduler, range(6)) == [26, 42, 58, 60, 66, 106]
    assert calls(model) == [5, 5, 4, 5]


def test_two_separate_rules():
    model = Denoiser()
    front = static(Site("span", 0, 2), 0, 2, total=4)
    back = static(Site("span", 2, 4), 0, 1, total=4)
    scheduler = enable(model, front, back, steps=4)
    # Step 1: 1 + 4 (front of step 0) = 5 -> 13 -> 30, back computed: residual 25.
    # Step 2: front computed: 2 -> 12, plus 25. Step 3: 3 + 10 + 25.
    assert drive(model, scheduler, range(4)) == [26, 30, 37, 38]
    assert calls(model) == [2, 2, 2, 2]


# Streams.

# Three blocks h' = 2h + e + c, e' = e + 1 with e = 10: h -> 8h + 4 * 11 + 2 * 13 + 15 = 8h + 85.


@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keywords"])
@pytest.mark.parametrize("order", ["eh", "he"])
def test_two_streams_are_reused_together(order, keywords):
    model = Pairs(order, keywords)
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    text = torch.full((1, 2, 1), 10.0)
    image = []
    with torch.no_grad():
        for i in range(4):
            scheduler.step_index = i
            h, e = model(torch.full((1, 2, 1), float(i)), text)
            image.append(h.flatten().tolist())
            assert e.flatten().tolist() == [13.0, 13.0]
    # Residual 85 at step 0 and 7 * 2 + 85 = 99 at step 2.
    assert image == [[85.0] * 2, [86.0] * 2, [101.0] * 2, [102.0] * 2]
    assert calls(model) == [2, 2, 2]
    assert text.flatten().tolist() == [10.0, 10.0]


@pytest.mark.parametrize("order", ["eh", "he"])
def test_a_stream_that_ends_before_the_last_block_does(order):
    """As in SD3 and Mochi: the last block returns None for the text."""
    model = Pairs(order, last_none=True)
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    text = torch.full((1, 1, 1), 10.0)
    out = drive(model, scheduler, range(4), encoder_hidden_states=text)
    assert out == [85, 86, 101, 102]
    assert calls(model) == [2, 2, 2]
    with torch.no_grad():
        scheduler.set_timesteps(4)
        for i in range(2):
            scheduler.step_index = i
            h, e = model(torch.full((1, 1, 1), float(i)), text)
            assert (h.item(), e) == (85 + i, None)


@pytest.mark.parametrize("order", ["eh", "he"])
def test_a_span_before_the_end_hands_on_both_streams(order):
    model = Pairs(order)
    scheduler = enable(model, static(Site("span", 0, 2), 0, total=3), steps=3)
    text = torch.full((1, 1, 1), 10.0)
    # Two blocks: h -> 4h + 35, e -> 12. Residuals 35 and 2; block 3 takes 2h + e + 3.
    out = drive(model, scheduler, range(3), encoder_hidden_states=text)
    assert out == [85, 2 * 36 + 15, 2 * 37 + 15]
    assert calls(model) == [1, 1, 3]


def test_linked_lists_are_one_piece():
    model = Joined(joined=False)
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    text = torch.full((1, 1, 1), 10.0)
    # Four pair blocks: 8h + 85, then 2h + 13 + 4 = 16h + 187. Residuals 187 and 15 * 2 + 187.
    out = drive(model, scheduler, range(4), encoder_hidden_states=text)
    assert out == [187, 188, 219, 220]
    assert calls(model) == [2, 2, 2, 2]
    # One payload: two streams of one float32.
    assert blockcache.summary(model).as_dict()["cache_bytes"] == 8


def test_lists_with_a_concatenation_between_are_two_pieces():
    model = Joined(joined=True)
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    text = torch.full((1, 1, 1), 10.0)
    # Double: h -> 4h + 35, residual 35 at step 0. Single: y -> 4y + 4, residual 3 * 35 + 4 = 109.
    # Step 1: 1 + 35 + 109. Step 2: 4 * 43 + 4 = 176, residuals 41 and 133. Step 3: 3 + 41 + 133.
    out = drive(model, scheduler, range(4), encoder_hidden_states=text)
    assert out == [144, 145, 176, 177]
    assert calls(model) == [2, 2, 2, 2]
    # Double holds h and e, single both as one tensor of two tokens.
    assert blockcache.summary(model).as_dict()["cache_bytes"] == 16


def test_a_span_across_the_concatenation_is_cut_there():
    model = Joined(joined=True)
    scheduler = enable(model, static(Site("span", 1, 3), 0, total=2), steps=2)
    text = torch.full((1, 1, 1), 10.0)
    # Step 0: 0 -> 11 -> 35 -> 71 -> 144; residuals 24 (block 1) and 36 (block 2).
    # Step 1: 1 -> 13, + 24 = 37, + 36 = 73 -> 148.
    assert drive(model, scheduler, range(2), encoder_hidden_states=text) == [144, 148]
    assert calls(model) == [2, 1, 1, 2]


# Models that write into tensors and add things in between.


def test_blocks_that_work_in_place():
    """An alias of the input as the reference gives 0 / 0 and a cache that never reuses, or reuses
    zeros."""
    model = Denoiser(in_place=True)
    scheduler = enable(model, static(Site("span", 1), 0, 1, 5))
    # Blocks 1..3: y -> 8y + 18, residual 7y + 18 of y = 2x + 1.
    expected = [26, 42, *(2 * x + 1 + 39 for x in (2, 3, 4)), 106]
    expected += [2 * x + 1 + 95 for x in (6, 7, 8, 9)]
    assert drive(model, scheduler, STEPS) == expected
    assert calls(model) == [10, 3, 3, 3]


@pytest.mark.parametrize("is_in_place", [False, True], ids=["new tensor", "in place"])
def test_what_the_model_adds_between_blocks_is_not_counted_twice(is_in_place):
    """A ControlNet adds its residual behind every block: 16 x + 26 + 10 (8 + 4 + 2 + 1)."""
    model = Denoiser()
    model.hint, model.is_hint_in_place = 10.0, is_in_place
    scheduler = enable(model, static(Site("stack"), 0, 1, 5))
    # The last addition is the model's own and comes on top; the residual of step 1 is 15 + 166.
    expected = [176, 192, *(x + 181 + 10 for x in (2, 3, 4)), 256]
    expected += [x + 241 + 10 for x in (6, 7, 8, 9)]
    assert drive(model, scheduler, STEPS) == expected
    assert calls(model) == [3] * 4


def test_the_callers_input_is_never_written_to():
    """On a reused step a model adding in place behind the first block must not find the latents."""
    model = Denoiser()
    model.hint, model.is_hint_in_place = 10.0, True
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    with torch.no_grad():
        for i in range(4):
            scheduler.step_index = i
            latents = torch.full((1, 1, 1), float(i))
            model(latents)
            assert latents.item() == i


def test_stored_payloads_are_never_handed_out():
    """The caller overwrites every output; a stored alias would spoil the later steps."""
    model = Denoiser()
    rule = static(Site("stack"), 0, total=4, payload="output")
    scheduler = enable(model, rule, steps=4)
    outputs = []
    with torch.no_grad():
        for i in range(4):
            scheduler.step_index = i
            out = model(torch.full((1, 1, 1), float(i)))
            outputs.append(out.item())
            out.fill_(-1e6)
    assert outputs == [26.0] * 4


# Models that do not call the same blocks every time.


def test_blocks_left_out_in_one_branch_only():
    """Skip-layer guidance: a second call a step without block 1 (x -> 8x + 22)."""
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    full, fewer = [], []
    with torch.no_grad():
        for i in range(4):
            scheduler.step_index = i
            x = torch.full((1, 1, 1), float(i))
            full.append(model(x).item())
            fewer.append(model(x, skip_layers=(1,)).item())
    assert full == [26, 27, 58, 59]
    # 0 -> 1 -> 5 -> 14... : 8x + 4 + 6 + 4 = 8x + 14 with residuals 14 and 28.
    assert fewer == [14, 15, 30, 31]
    assert [b["block_calls_skipped"] for b in branches(model)] == [8, 6]
    assert calls(model) == [4, 2, 4, 4]


def plain_without(left_out, x):
    for i in range(4):
        if i not in left_out:
            x = 2 * x + i + 1
    return float(x)


@pytest.mark.parametrize("left_out", [(0,), (1,), (3,), (0, 3), (1, 2)])
@pytest.mark.parametrize("computes", [(0, 5), (0, 3, 5)], ids=["at a reused step", "at a computed"])
def test_a_model_that_leaves_blocks_out_from_step_three_on(left_out, computes):
    """Raised KeyError, or went on with payloads that held the left-out block. Now the call is
    computed, the cache dropped, the branch watched again, and reuse goes on from there."""
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), *computes))

    def before(i):
        model.leave_out = left_out if i >= 3 else ()

    outputs = drive(model, scheduler, STEPS, before)
    assert outputs[:3] == [26, 27, 28]
    assert outputs[3] == plain_without(left_out, 3)
    assert outputs[5] == plain_without(left_out, 5)
    residual = plain_without(left_out, 5) - 5
    assert outputs[6:] == [x + residual for x in (6, 7, 8, 9)]
    reasons = blockcache.summary(model).as_dict()["reasons"]
    assert reasons == {"the model did not call the same blocks as before": 1}


@pytest.mark.parametrize("late", [(0,), (1,), (3,)])
def test_a_model_that_calls_more_blocks_from_step_three_on(late):
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), 0, 5))

    def before(i):
        model.leave_out = late if i < 3 else ()

    outputs = drive(model, scheduler, STEPS, before)
    assert outputs[0] == plain_without(late, 0)
    # At the edge of the unit the first, watched step keeps nothing: one more step is computed.
    last = 0 if late == (1,) else 1
    assert outputs[1] == plain_without(late, last) + 1 - last
    assert outputs[2] == plain_without(late, last) + 2 - last
    assert outputs[3] == 74
    assert outputs[5:] == [106, 107, 108, 109, 110]


def test_a_model_that_calls_its_blocks_in_another_order_is_left_alone(caplog):
    class Backwards(Denoiser):
        def forward(self, hidden_states, timestep=None):
            for block in reversed(self.blocks):
                hidden_states = block(hidden_states)
            return hidden_states

    model, twin = Backwards(), Backwards()
    scheduler = enable(model, static(Site("stack"), 0, 5))
    assert drive(model, scheduler, STEPS) == drive(twin, Scheduler(), STEPS)
    assert calls(model) == [10] * 4
    assert "order they are declared" in caplog.text


def test_one_block_called_twice_is_left_alone(caplog):
    class Twice(Denoiser):
        def forward(self, hidden_states, timestep=None):
            for block in self.blocks:
                hidden_states = block(block(hidden_states))
            return hidden_states

    model, twin = Twice(), Twice()
    scheduler = enable(model, static(Site("stack"), 0, 5))
    assert drive(model, scheduler, STEPS) == drive(twin, Scheduler(), STEPS)
    assert calls(model) == [20] * 4
    assert "not called once each" in caplog.text


def test_skip_connections_out_of_a_span_are_refused(caplog):
    """A U-ViT: a block also takes the output of an earlier one, by itself or in a tuple."""

    class Taking(torch.nn.Module):
        """A block that takes the skip as an argument, by itself or in a tuple."""

        def __init__(self, in_tuple):
            super().__init__()
            self.child, self.in_tuple, self.calls = torch.nn.Identity(), in_tuple, 0

        def forward(self, hidden_states, skips):
            self.calls += 1
            return 2 * hidden_states + (skips[0] if self.in_tuple else skips)

    for in_tuple in (False, True):

        class Model(Denoiser):
            def __init__(self, in_tuple=in_tuple):
                super().__init__(3)
                self.blocks.append(Taking(in_tuple))
                self.in_tuple = in_tuple

            def forward(self, hidden_states, timestep=None):
                first = hidden_states = self.blocks[0](hidden_states)
                for block in self.blocks[1:3]:
                    hidden_states = block(hidden_states)
                return self.blocks[3](hidden_states, (first,) if self.in_tuple else first)

        caplog.clear()
        model, twin = Model(), Model()
        scheduler = enable(model, static(Site("span", 0, 2), 0, total=4), steps=4)
        # Blocks 0 and 1 as one: block 3 also needs block 0's output, which would be missing.
        assert drive(model, scheduler, range(4)) == drive(twin, Scheduler(4), range(4))
        assert calls(model) == [4, 4, 4, 4]
        assert "skip connection" in caplog.text
        # Block 0 by itself, or all four, is fine.
        alone = Model()
        scheduler = enable(alone, static(Site("span", 0, 1), 0, total=2), steps=2)
        # Step 0: 0 -> 1 -> 4 -> 11 -> 23. Step 1: 1 + 1 = 2 -> 6 -> 15 -> 32.
        assert drive(alone, scheduler, range(2)) == [23, 32]
        assert calls(alone) == [1, 2, 2, 2]


@pytest.mark.parametrize("place", ["before a block", "at the end"])
def test_a_skip_connection_that_the_root_keeps_for_itself(place):
    """HunyuanDiT with a ControlNet: the root adds something to an early block's output and hands
    the sum on, so no block ever receives that output itself. Reused or not, a second call with
    the same input must give the same result."""

    class Keeping(Denoiser):
        def forward(self, hidden_states, timestep=None):
            kept = hidden_states = self.blocks[0](hidden_states)
            for i, block in enumerate(self.blocks[1:], start=1):
                if i == 3 and place == "before a block":
                    hidden_states = hidden_states + 10 * kept
                hidden_states = block(hidden_states)
            return hidden_states + 10 * kept if place == "at the end" else hidden_states

    for site in (Site("span", 0, 2), Site("span", 0, 3), Site("stack"), Site("span", 1)):
        model = Keeping()
        plain = drive(model, Scheduler(2), [3.0, 3.0])
        scheduler = enable(model, static(site, 0, total=2), steps=2)
        assert drive(model, scheduler, [3.0, 3.0]) == plain, site


def test_a_module_that_is_in_the_list_twice(caplog):
    """Shared weights: one module is several blocks. Nothing is reused, nothing stays behind."""
    model, twin = Denoiser(), Denoiser()
    for one in (model, twin):
        one.blocks = torch.nn.ModuleList([one.blocks[0]] * 3)
    attributes = [dict(module.__dict__) for module in model.modules()]
    try:
        scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    except blockcache.UnsupportedModelError:
        scheduler = Scheduler(4)
    # 2 x + 1 three times.
    assert drive(model, scheduler, range(4)) == [7, 15, 23, 31]
    blockcache.disable(model)
    calls(model)
    calls(twin)
    assert drive(model, Scheduler(4), range(4)) == drive(twin, Scheduler(4), range(4))
    assert calls(model) == calls(twin)
    assert [dict(module.__dict__) for module in model.modules()] == attributes


# Blocks of other forms.


class Odd(torch.nn.Module):
    """Four blocks x -> 2 x + c, called and taken from as `call` and `take` say."""

    class Block(torch.nn.Module):
        def __init__(self, constant):
            super().__init__()
            self.child, self.constant, self.calls = torch.nn.Identity(), constant, 0

        def go(self, x):
            self.calls += 1
            return 2 * x + self.constant

    def __init__(self, forward, call=None, take=None):
        super().__init__()
        kind = type("OddBlock", (self.Block,), {"forward": forward})
        self.blocks = torch.nn.ModuleList(kind(i + 1.0) for i in range(4))
        self.call = call or (lambda block, x: block(x))
        self.take = take or (lambda out: out)

    def forward(self, hidden_states, timestep=None):
        for block in self.blocks:
            hidden_states = self.take(self.call(block, hidden_states))
        return hidden_states


class Named(NamedTuple):
    hidden_states: torch.Tensor
    count: int


def variadic(self, *args, **kwargs):
    return self.go(args[0])


def listed(self, x):
    return [self.go(x)]


def mixed(self, x):
    return None, self.go(x), 3


def named(self, x):
    return Named(self.go(x), 3)


def keyword_only(self, *, x):
    return self.go(x)


def defaulted(self, x=None, scale=1.0):
    return self.go(x) * scale


REUSABLE = {
    "args": (variadic, None, None),
    "list": (listed, None, lambda out: out[0]),
    "tuple with None and a number": (mixed, None, lambda out: out[out[2] - 2]),
    "named tuple": (named, None, lambda out: out[out.count - 3]),
    "keyword only": (keyword_only, lambda block, x: block(x=x), None),
    "defaults": (defaulted, lambda block, x: block(scale=1.0, x=x), None),
}


@pytest.mark.parametrize("form", REUSABLE)
def test_blocks_of_other_forms_are_reused(form):
    model = Odd(*REUSABLE[form])
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    assert drive(model, scheduler, range(4)) == [26, 27, 58, 59]
    assert calls(model) == [2] * 4


def dictionary(self, x):
    return {"x": self.go(x)}


def with_a_loss(self, x):
    return self.go(x), x.sum()


UNKNOWN = {
    "dictionary": (dictionary, None, lambda out: out["x"]),
    "a tensor the model needs": (with_a_loss, None, lambda out: out[0] + 0 * out[1]),
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_what_is_not_understood_is_computed_and_said(form, caplog):
    model = Odd(*UNKNOWN[form])
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    assert drive(model, scheduler, range(4)) == [26, 42, 58, 74]
    assert calls(model) == [4] * 4
    assert "which stream" in caplog.text or "no streams" in caplog.text


@pytest.mark.parametrize("addition", [0.0, 1.0], ids=["linked", "not linked"])
def test_a_parameter_in_front_of_the_stream(addition):
    """`forward(self, temb, x)`: with nothing linked the first tensor was taken for the stream."""

    def forward(self, temb, x):
        return self.go(x) + 0 * temb

    temb = torch.ones(1, 1, 1)
    take = (lambda out: out + addition) if addition else None
    model = Odd(forward, lambda block, x: block(temb, x), take)
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    # With 1 added behind each block: 16 x + 26 + 8 + 4 + 2 + 1, the last 1 by the model itself.
    extra = 15 * addition
    first, third = 26 + extra, 58 + extra
    assert drive(model, scheduler, range(4)) == [first, first + 1, third, third + 1]
    assert calls(model) == [2] * 4
