"""Methods that repeat the output of a run of blocks, against their rules written out."""

import pytest

import blockcache
from blockcache import PlanError, recipes
from paper_toys import SIZE, WIDTH, Transformer, UNet, text, walk
from toys import Scheduler


def deep_cache(interval, outer):
    """Outer blocks always, joined by their own skip connections; the inside every n-th step."""

    def rule(model, words):
        state = {}

        def denoise(i, timestep, latents):
            temb, h = model.embed(timestep), model.tokens(latents)
            skips = []
            is_full = i % interval == 0
            for block in model.down_blocks if is_full else model.down_blocks[:outer]:
                h, skip = block(h, temb)
                skips.append(skip)
            if is_full:
                h = model.mid_block(h, temb)
                for block in model.up_blocks[: 3 - outer]:
                    h = block(h, temb, skips.pop())
                state["inside"] = h
            h = state["inside"]
            for block in model.up_blocks[3 - outer :]:
                h = block(h, temb, skips.pop())
            return model.output(h)

        return denoise

    return rule


@pytest.mark.parametrize(("interval", "outer"), [(3, 1), (2, 2), (5, 3)])
def test_deep_cache(agree, interval, outer):
    ours = agree(recipes.deep_cache(interval, outer), deep_cache(interval, outer), make=UNet)
    assert ours.steps_of("3") == list(range(0, 20, interval))
    assert ours.steps_of("0") == ours.steps_of("6") == list(range(20))


def test_deep_cache_keeps_one_tensor():
    """The authors' code keeps the output of every wrapped layer."""
    model, scheduler, words = UNet(), Scheduler(6), text()
    blockcache.enable(model, "deep_cache", scheduler=scheduler)
    walk(model.log, lambda i, t, x: model(x, t, words), scheduler)
    assert blockcache.summary(model).as_dict()["cache_bytes"] == WIDTH * SIZE * SIZE * 4


def test_deep_cache_is_for_unets():
    with pytest.raises(PlanError, match="inside of a U-Net.*plain chain of blocks"):
        blockcache.enable(Transformer(), "deep_cache", scheduler=Scheduler(20))
    with pytest.raises(PlanError, match="does not fit"):
        blockcache.enable(UNet(), recipes.deep_cache(outer=4), scheduler=Scheduler(20))


def block_dance(group, start, stop, depth):
    """Within groups the hidden state behind block `depth` - 1 is taken over; block 0 runs."""

    def rule(model, words):
        state = {}

        def denoise(i, timestep, latents):
            temb, h = model.embed(timestep), model.tokens(latents)
            is_first = not start <= i < stop or (i - start) % group == 0
            for number, block in enumerate(model.blocks):
                if is_first or number == 0 or number >= depth:
                    h = block(h, words, temb)
                elif number == 1:
                    h = state["hidden"]
                if number == depth - 1:
                    state["hidden"] = h
            return model.output(h)

        return denoise

    return rule


@pytest.mark.parametrize(
    ("settings", "group", "start", "stop", "depth"),
    [
        ({}, 2, 8, 19, 6),  # 40 to 95 % of 20 steps, 0.71 of 8 blocks
        ({"group": 3, "start": 0.2, "stop": 0.8, "depth": 4}, 3, 4, 16, 4),
    ],
)
def test_block_dance(agree, settings, group, start, stop, depth):
    recipe = recipes.block_dance(**settings)
    ours = agree(recipe, block_dance(group, start, stop, depth), make=lambda: Transformer(8))
    assert ours.steps_of("0") == ours.steps_of("7") == list(range(20))
    assert ours.steps_of("1") != list(range(20))


def test_block_dance_reaches_the_published_20_of_28_blocks():
    (rule,) = recipes.block_dance().rules
    assert rule.site.limits(28) == (1, 20)


def test_block_dance_refuses_a_unet():
    with pytest.raises(PlanError, match="block 1 also feeds block 5 by a skip connection"):
        blockcache.enable(UNet(), "block_dance", scheduler=Scheduler(20))
