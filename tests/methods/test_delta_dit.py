"""Delta-DiT against its rule written out: rear blocks early, front blocks late."""

import pytest

import blockcache
from blockcache import PlanError, recipes
from paper_toys import SIZE, WIDTH, Transformer, UNet, text, walk
from toys import Scheduler


def by_hand(interval, gate, count):
    """Skip `count` of the blocks; from step `gate` on the front ones."""

    def rule(model, words):
        state = {"delta": None, "age": 0}

        def denoise(i, timestep, latents):
            temb, h = model.embed(timestep), model.tokens(latents)
            total = len(model.blocks)
            lo, hi = (0, count) if i >= gate else (total - count, total)
            is_full = i in (0, gate) or state["age"] == interval
            if is_full:
                state["age"] = 0
            state["age"] += 1
            for number, block in enumerate(model.blocks):
                if is_full and number == lo:
                    entered = h
                if is_full or not lo <= number < hi:
                    h = block(h, words, temb)
                elif number == lo:
                    h = h + state["delta"]
                if is_full and number == hi - 1:
                    state["delta"] = h - entered
            return model.output(h)

        return denoise

    return rule


@pytest.mark.parametrize(
    ("interval", "gate", "share", "steps", "by_step", "count"),
    [
        (2, 0.6, 0.75, 20, 12, 3),  # as published: 12 of 20 steps, three quarters of the blocks
        (3, 0.6, 0.5, 20, 12, 2),
        (4, 0.3, 0.25, 10, 3, 1),
        (3, 0.5, 0.75, 7, 4, 3),  # the switch comes in the middle of an interval
    ],
)
def test_the_papers_rule(agree, interval, gate, share, steps, by_step, count):
    recipe = recipes.delta_dit(interval, gate, share)
    ours = agree(recipe, by_hand(interval, by_step, count), steps)
    assert ours.steps_of("3")[0] == 0
    # At the switch every block runs, whatever the interval says.
    assert {"0", "1", "2", "3"} <= set(ours.ran[by_step])


def test_the_defaults_are_the_papers():
    assert recipes.delta_dit() == recipes.delta_dit(interval=2, gate=0.6, share=0.75)


def test_only_the_phase_at_hand_is_kept():
    """The paper stores one residual; the two phases' spans overlap, but never in time."""
    model, scheduler, words = Transformer(), Scheduler(20), text()
    one = WIDTH * SIZE * SIZE * 4
    held = []

    def denoise(i, timestep, latents):
        output = model(latents, timestep, words)
        runner = blockcache.api.attachments(model)[""].engine
        (branch,) = runner._local.run.branches
        held.append(branch.cache_bytes())
        return output

    blockcache.enable(model, "delta_dit", scheduler=scheduler)
    walk(model.log, denoise, scheduler)
    # Steps 11 and 19 are the last ones that each phase reuses.
    assert held == [one] * 11 + [0] + [one] * 7 + [0]


def test_a_model_whose_front_is_skip_connected_is_refused():
    with pytest.raises(PlanError, match="block 0 also feeds block 6 by a skip connection"):
        blockcache.enable(UNet(), "delta_dit", scheduler=Scheduler(20))


@pytest.mark.parametrize("settings", [{"share": 1.0}, {"share": 0.0}, {"gate": 0.0}, {"gate": 1.0}])
def test_impossible_settings(settings):
    with pytest.raises(PlanError):
        recipes.by_name("delta_dit", **settings)


def test_the_rear_rule_is_not_counted_from_the_run(agree):
    """Interval 5 and gate at step 8: full at 0, 5, 8, 13, 18 and not at 10 or 15."""
    ours = agree(recipes.delta_dit(5, 0.4, 0.5), by_hand(5, 8, 2), 20)
    full = [i for i, ran in enumerate(ours.ran) if {"0", "1", "2", "3"} <= set(ran)]
    assert full == [0, 5, 8, 13, 18]
