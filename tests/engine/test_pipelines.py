"""What must hold for each of the ten tiny pipelines."""

import hashlib

import pytest
import torch

import blockcache
from blockcache import Recipe, Rule, Site, recipes
from blockcache.plan import Copy, Every, MaskTable, Taylor
from toys import Scheduler

STEPS = 4


def compute_everything(site):
    return Recipe((Rule(site, Every(1), Taylor(1)),), name="compute everything")


def reuse(site, *computed, total=STEPS, predictor=None, payload="residual"):
    table = MaskTable((computed,), total)
    return Recipe((Rule(site, table, predictor or Copy(), payload=payload),))


@pytest.mark.parametrize(
    "recipe",
    [
        compute_everything(Site("stack")),
        compute_everything(Site("span", 1)),
        compute_everything(Site("block")),
        recipes.geometric(1.0),
        recipes.first_block(0.0, warmup=0),
    ],
    ids=["stack", "span", "block", "geometric 1", "threshold 0"],
)
def test_computing_everything_is_bit_identical(each, recipe, block_count):
    plain = each.plain(STEPS)
    blockcache.enable(each.pipe, recipe)
    with each.spy() as spy:
        assert torch.equal(each.run(STEPS), plain)
    assert spy.calls == [spy.root] * block_count[each.name]
    assert blockcache.summary(each.pipe).as_dict()["skipped_fraction"] == 0


def snapshot(denoiser, folder):
    """Everything about a model that `disable` has to give back."""
    denoiser.save_pretrained(folder)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    modules = dict(denoiser.named_modules())
    return {
        "files": files,
        "modules": list(modules),
        "keys": list(denoiser.state_dict()),
        "forwards": [(name, module.forward.__func__) for name, module in modules.items()],
        "attributes": [(name, sorted(module.__dict__)) for name, module in modules.items()],
        "hooks": [
            (len(module._forward_pre_hooks), len(module._forward_hooks))
            for module in modules.values()
        ],
    }


def test_disable_gives_the_model_back(each, tmp_path):
    plain = each.plain(STEPS)
    before = snapshot(each.denoiser, tmp_path / "before")
    blockcache.enable(each.pipe, "fast")
    each.run(STEPS)
    enabled = snapshot(each.denoiser, tmp_path / "enabled")
    # Also while it is enabled, names, weights, files and forwards are the model's own.
    for part in ("files", "modules", "keys", "forwards"):
        assert enabled[part] == before[part], part
    blockcache.disable(each.pipe)
    assert snapshot(each.denoiser, tmp_path / "after") == before
    assert torch.equal(each.run(STEPS), plain)


class Captured(Exception):
    """Raised to stop a pipeline at its first denoiser call."""


def first_call(each):
    """The arguments of the first denoiser call of a run."""
    seen = []

    def capture(module, args, kwargs):
        seen.append((args, kwargs))
        raise Captured

    handle = each.denoiser.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with pytest.raises(Captured):
            each.run(STEPS)
    finally:
        handle.remove()
    return seen[0]


SITES = {
    "stack": Site("stack"),
    "tail": Site("span", 1),
    "middle": Site("span", 1, -1),
    "last": Site("span", -1),
    "front": Site("span", 0, 2),
    "block": Site("block"),
    "one": Site("block", 1, 2),
}


@pytest.mark.parametrize("payload", ["residual", "output"])
@pytest.mark.parametrize("place", SITES)
def test_a_replay_on_the_same_input_gives_the_same_output(each, place, payload, block_count):
    """Two calls with one and the same input, the second one reused: it must not matter."""
    args, kwargs = first_call(each)
    scheduler = Scheduler(2)
    site, total = SITES[place], block_count[each.name]
    recipe = reuse(site, 0, total=2, payload=payload)
    if each.name == "sd15" and place == "front":
        with pytest.raises(blockcache.PlanError, match="block 0 also feeds block 6"):
            blockcache.enable(each.denoiser, recipe, scheduler=scheduler)
        return
    blockcache.enable(each.denoiser, recipe, scheduler=scheduler)
    kwargs = {**kwargs, "return_dict": False}
    outputs = []
    with torch.no_grad(), each.spy() as spy:
        for i in range(2):
            scheduler.step_index = i
            outputs.append(each.denoiser(*args, **kwargs)[0].double())
    computed, replayed = outputs
    assert (replayed - computed).abs().max() <= 2e-6 * computed.abs().max()
    lo, hi = site.limits(total)
    expected = [1 if lo <= i < hi else 2 for i in range(total)]
    assert spy.calls == expected


@pytest.mark.parametrize("recipe", ["geometric", "first_block", "every"], ids=lambda recipe: recipe)
def test_runs_repeat_and_the_summary_tells_the_truth(each, recipe, block_count):
    if recipe == "first_block":
        recipe = recipes.first_block(5.0, warmup=1, max_streak=2)
    blockcache.enable(each.pipe, recipe)
    results, summaries = [], []
    for _ in range(2):
        with each.spy() as spy:
            results.append(each.run(6))
        figures = blockcache.summary(each.pipe).as_dict()
        branches = figures["branches"]
        assert sum(b["block_calls_skipped"] for b in branches) > 0
        assert sum(spy.calls) == sum(b["block_calls"] - b["block_calls_skipped"] for b in branches)
        assert sum(b["block_calls"] for b in branches) == spy.root * block_count[each.name]
        assert sum(b["steps"] for b in branches) == spy.root
        maps = [sum(column) for b in branches for column in zip(*b["map"], strict=True)]
        per_block = [sum(maps[i :: block_count[each.name]]) for i in range(len(spy.calls))]
        assert per_block == spy.calls
        for b in branches:
            assert b["computed"] + b["reused"] == b["steps"] == 6
        summaries.append(figures)
    assert torch.equal(results[0], results[1])
    assert summaries[0] == summaries[1]


# Stack residuals of two steps, in float32. By hand from the sizes in tiny_pipelines:
# tokens x channels (+ text tokens x channels where the text is a stream) x batch x 4 bytes.
ONE_PAYLOAD = {
    "flux": (64 * 32 + 32 * 32) * 4,
    "sd3": 2 * 256 * 32 * 4,  # the last block drops the text
    "pixart": 2 * 64 * 32 * 4,
    "dit": 2 * 64 * 32 * 4,
    "sd15": 2 * 8 * 16 * 16 * 4,
    "wan": 2 * 12 * 24 * 4,  # two branches
    "cogvideox": 2 * (12 + 32) * 32 * 4,
    "hunyuan_video": (48 + 32) * 32 * 4,
    "ltx": 2 * 192 * 32 * 4,
    "mochi": 2 * (2 + 16) * 16 * 4,  # the last block returns the text as it came
}


def test_the_cache_is_as_large_as_worked_out_by_hand(each):
    for order in (0, 1):
        blockcache.enable(each.pipe, recipes.geometric(0.5, order=order))
        each.run(6)
        figures = blockcache.summary(each.pipe).as_dict()
        assert figures["cache_bytes"] == (order + 1) * ONE_PAYLOAD[each.name]
