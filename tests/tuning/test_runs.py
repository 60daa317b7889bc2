"""Real runs as a measure, on a pipeline with random weights."""

import numpy as np
import pytest
import torch

import blockcache
import tiny_pipelines
from blockcache.errors import BlockCacheError
from blockcache.plan import Every, MaskTable, Recipe, Rule, Site
from blockcache.tuning.runs import latent_error, with_segments

STEPS = 5


@pytest.fixture(scope="module")
def flux():
    pipe, kwargs = tiny_pipelines.BUILDERS["flux"]()
    kwargs = {k: v for k, v in kwargs.items() if k not in ("prompt", "generator", "output_type")}
    return pipe, {**kwargs, "num_inference_steps": STEPS}


def final(pipe, call, seed, recipe=None):
    blockcache.disable(pipe)
    if recipe is not None:
        blockcache.enable(pipe, recipe)
    generator = torch.Generator("cpu").manual_seed(seed)
    found = pipe("a", generator=generator, output_type="latent", **call).images
    blockcache.disable(pipe)
    return found.double().numpy()


def test_the_error_is_that_of_the_final_latents(flux):
    pipe, call = flux
    recipe = Recipe((Rule(Site("stack"), Every(2)),))
    expected = []
    for seed in (4, 5):
        plain, cached = final(pipe, call, seed), final(pipe, call, seed, recipe)
        expected.append(((cached - plain) ** 2).mean() / (plain**2).mean())
    error = latent_error(pipe, ["a", "a"], [4, 5], **call)
    assert error(recipe) == pytest.approx(np.mean(expected), rel=1e-5)
    assert error(Recipe((Rule(Site("stack"), Every(1)),))) == 0.0
    assert error(recipe) == error(recipe)


def test_segments_are_single_stretches_of_reuse(flux):
    pipe, call = flux
    trace = blockcache.trace(pipe, ["a"], seeds=[7], scopes=("stack",), **call)
    seen = []
    found = with_segments(pipe, trace, 3, on_progress=lambda *counts: seen.append(counts))
    pairs = {(i, j) for i in range(STEPS) for j in range(STEPS) if 2 <= j - i <= 3}
    assert seen[-1] == (len(pairs), len(pairs))
    assert {tuple(map(int, p)) for p in np.argwhere(~np.isnan(found.segments))} == pairs
    plain = final(pipe, call, 7)
    for i, j in ((0, 2), (1, 4)):
        kept = tuple(s for s in range(STEPS) if not i < s < j)
        cached = final(pipe, call, 7, Recipe((Rule(Site("stack"), MaskTable((kept,), STEPS)),)))
        expected = np.abs(cached - plain).mean() / np.abs(plain).mean()
        assert found.segments[i, j] == pytest.approx(expected, rel=1e-4)
    # Between 0 and 2 lies one step, between 0 and 3 two: more is lost.
    assert found.segments[0, 3] > found.segments[0, 2] > 0
    recipe = blockcache.recipes.le_mi_ca(found, 0.6)
    assert set(recipe.rules[0].policy.computed[0]) >= {0, STEPS - 1}


def test_bad_input(flux):
    pipe, call = flux
    trace = blockcache.trace(pipe, ["a"], scopes=("stack",), **call)
    for span, prompts in ((1, 1), (3, 0), (3, 2)):
        with pytest.raises(BlockCacheError, match="need span >= 2 and 1 to 1 prompts"):
            with_segments(pipe, trace, span, prompts)
    with pytest.raises(BlockCacheError, match="no prompts"):
        latent_error(pipe, [], **call)
