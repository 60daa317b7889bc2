"""Whose state is whose: branches, calls out of turn, exceptions. Every recipe.

Each case is a bug seen in shipped caches: one accumulator for two branches, branches told apart by
the parity of calls, counters that go on where an interrupted run left them.
"""

import pytest
import torch

import blockcache
from blockcache import Recipe, recipes
from paper_toys import SIZE, WIDTH, Transformer, UNet, ready_recipes, text
from toys import Scheduler

STEPS = 12
# So that everything both computes and reuses on the toy; the defaults are for large models.
LOOSER = {
    "db_cache": {"threshold": 0.6, "front": 1, "back": 1},
    "di_cache": {"threshold": 0.6},
    "easy_cache": {"threshold": 2.0},
    "first_block": {"threshold": 0.6},
    "sea_cache": {"threshold": 0.9},
    "spe_ca": {"threshold": 2.0, "decay": 0.5},
    "tea_cache": {"threshold": 0.6},
}


@pytest.fixture(params=ready_recipes())
def name(request):
    return request.param


def toy(name):
    return UNet() if name == "deep_cache" else Transformer(4)


def alone(name):
    """The recipe with every branch deciding for itself: then each must be as if it ran alone."""
    recipe = recipes.by_name(name, **LOOSER.get(name, {}))
    return Recipe(recipe.rules, "independent", recipe.name)


def start(branch):
    generator = torch.Generator().manual_seed(branch)
    return torch.randn(1, WIDTH, SIZE, SIZE, generator=generator) * (1 + branch)


def run(model, recipe, order_of, on_step=lambda i: None):
    """Euler runs of several branches side by side; `order_of(step)` says who is called when."""
    scheduler = Scheduler(STEPS)
    latents, words = [start(b) for b in range(3)], [text(b) for b in range(3)]
    outputs = {}
    if recipe is not None:
        blockcache.enable(model, recipe, scheduler=scheduler)
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            scheduler.step_index = i
            on_step(i)
            for b in order_of(i):
                outputs[i, b] = out = model(latents[b], timestep, words[b])
                step = scheduler.sigmas[i + 1] - scheduler.sigmas[i]
                latents[b] = latents[b] + step * out
    return outputs


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def of(outputs, branch):
    return {key: value for key, value in outputs.items() if key[1] == branch}


def test_three_branches_in_changing_order(name):
    """Parity of calls would mix up three branches, and any two that swap places."""
    model = toy(name)
    together = run(model, alone(name), lambda i: [(0, 1, 2), (2, 0, 1), (1, 0, 2)][i % 3])
    assert any(b["reused"] or b["part_calls_reused"] for b in figures(model))
    for branch in range(3):
        single = run(toy(name), alone(name), lambda i, b=branch: (b,))
        assert same(of(together, branch), single), f"branch {branch}"


def test_a_branch_that_comes_and_goes(name):
    """Guidance in steps 3 to 8 only: it starts with a full step and does not disturb the others."""
    together = run(toy(name), alone(name), lambda i: (0, 2) if 3 <= i <= 8 else (0,))
    assert same(of(together, 0), run(toy(name), alone(name), lambda i: (0,)))
    plain = run(toy(name), None, lambda i: (2,) if 3 <= i <= 8 else ())
    assert torch.equal(together[3, 2], plain[3, 2])


def test_an_exception_leaves_nothing_behind(name):
    """After an interrupted run the next one is as the first run of a fresh model."""
    model = toy(name)
    now = [0]

    def fail(module, args):
        if now[0] >= 5:
            raise KeyboardInterrupt

    first = model.down_blocks[0] if name == "deep_cache" else model.blocks[0]
    handle = first.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(model, alone(name), lambda i: (0, 1), lambda i: now.__setitem__(0, i))
    handle.remove()
    # Still enabled, still the same recipe; only the schedule is set anew.
    attached = blockcache.api.attachments(model)[""].engine
    scheduler = attached._scheduler
    scheduler.set_timesteps(STEPS)
    latents, words, outputs = start(0), text(0), []
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            scheduler.step_index = i
            outputs.append(model(latents, timestep, words))
            latents = latents + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * outputs[-1]
    fresh = run(toy(name), alone(name), lambda i: (0,))
    assert all(torch.equal(outputs[i], fresh[i, 0]) for i in range(STEPS))


def test_joint_branches_decide_alike(name):
    """As shipped, the branches of a step are computed or reused together."""
    model = toy(name)
    recipe = recipes.by_name(name, **LOOSER.get(name, {}))
    run(model, recipe, lambda i: (0, 1, 2))
    first, *others = figures(model)
    assert first["reused"] or first["part_calls_reused"]
    for other in others:
        assert other["map"] == first["map"]
        assert other["part_calls_reused"] == first["part_calls_reused"]


def figures(model):
    return blockcache.summary(model).as_dict()["branches"]
