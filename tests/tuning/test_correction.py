"""Scale and shift of reused payloads, where the right answer is known."""

import numpy as np
import pytest
import torch

import blockcache
import tiny_pipelines
from blockcache.errors import PlanError
from blockcache.plan import Copy, Every, Gate, Recipe, Rule, ScaleShift, Site, Taylor
from blockcache.tuning.correction import distilled, scale_shift

EVERY_OTHER = Recipe((Rule(Site("stack"), Every(2)),), name="every other")


@pytest.fixture(scope="module")
def flux():
    pipe, kwargs = tiny_pipelines.BUILDERS["flux"]()
    kwargs = {k: v for k, v in kwargs.items() if k not in ("prompt", "generator", "output_type")}
    return pipe, kwargs


@pytest.fixture
def staged(flux):
    """The tiny Flux and its arguments."""
    pipe, kwargs = flux
    return pipe, {**kwargs, "num_inference_steps": 6}


def table(recipe, rule=0):
    predictor = recipe.rules[rule].predictor
    assert isinstance(predictor, ScaleShift)
    return {t.stream: t.array() for t in predictor.tables}


def test_the_fit_is_that_of_least_squares(staged):
    """Against numpy's least squares on payloads recorded by plain hooks, with one prompt."""
    pipe, call = staged
    block = pipe.transformer.transformer_blocks[1]
    seen = []
    handle = block.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(
            (out[1] - kwargs["hidden_states"]).detach().clone()
        ),
        with_kwargs=True,
    )
    blockcache.disable(pipe)
    generator = torch.Generator("cpu").manual_seed(3)
    with torch.no_grad():
        pipe("a", generator=generator, output_type="latent", **call)
    handle.remove()
    recipe = Recipe((Rule(Site("block", 1, 2), Every(3)),), name="one block")
    made = table(scale_shift(pipe, ["a"], recipe, seeds=[3], **call))["hidden_states"]
    assert made.shape[:3] == (1, 6, 2)
    for step, anchor in ((1, 0), (2, 0), (4, 3), (5, 3)):
        x, y = (seen[i].reshape(-1, seen[i].shape[-1]).double().numpy() for i in (anchor, step))
        for channel in range(0, x.shape[1], 7):
            design = np.stack([x[:, channel], np.ones(len(x))], 1)
            expected, shift = np.linalg.lstsq(design, y[:, channel], rcond=None)[0]
            # The fit is pulled towards a copy by a thousandth, and stored in fp16.
            assert made[0, step, 0, channel] == pytest.approx(expected, abs=0.02)
            assert made[0, step, 1, channel] == pytest.approx(shift, abs=0.02)
    for step in (0, 3):
        np.testing.assert_array_equal(made[0, step], [[1.0] * x.shape[1], [0.0] * x.shape[1]])


def error(pipe, call, recipe, seed=3):
    def run():
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            return pipe("a", generator=generator, output_type="latent", **call).images

    blockcache.disable(pipe)
    reference = run()
    with blockcache.enabled(pipe, recipe):
        found = run()
    return float((found - reference).norm() / reference.norm())


def test_a_corrected_recipe_is_nearer_to_the_uncached_run(staged):
    pipe, call = staged
    corrected = scale_shift(pipe, ["a", "b"], EVERY_OTHER, **call)
    assert corrected.name == "every other corrected"
    assert error(pipe, call, corrected) < 0.8 * error(pipe, call, EVERY_OTHER)


def test_sub_layers_are_corrected_too(staged):
    pipe, call = staged
    recipe = Recipe((Rule(Site("attn"), Every(3), payload="output"),))
    corrected = scale_shift(pipe, ["a"], recipe, **call)
    assert error(pipe, call, corrected) < error(pipe, call, recipe)


def test_distilling_lowers_the_loss_and_leaves_the_model_alone(staged):
    pipe, call = staged
    before = {n: p.detach().clone() for n, p in pipe.transformer.named_parameters()}
    grads = [p.requires_grad for p in pipe.transformer.parameters()]
    losses = []
    learnt = distilled(
        pipe,
        ["a", "b"],
        EVERY_OTHER,
        rounds=8,
        on_progress=lambda done, total, loss: losses.append(loss),
        **call,
    )
    assert len(losses) == 16
    assert np.mean(losses[-2:]) < 0.7 * np.mean(losses[:2])
    assert error(pipe, call, learnt, seed=99) < error(pipe, call, EVERY_OTHER, seed=99)
    assert all(torch.equal(before[n], p) for n, p in pipe.transformer.named_parameters())
    assert [p.requires_grad for p in pipe.transformer.parameters()] == grads
    assert all(p.grad is None for p in pipe.transformer.parameters())


def test_a_corrected_plan_survives_a_file(staged, tmp_path):
    pipe, call = staged
    corrected = scale_shift(pipe, ["a"], EVERY_OTHER, **call)
    plan = blockcache.plan_for(pipe, corrected, steps=6)
    plan.save(tmp_path / "plan.json")
    loaded = blockcache.Plan.load(tmp_path / "plan.json")
    assert error(pipe, call, loaded) == error(pipe, call, plan)


@pytest.mark.parametrize("fit", [scale_shift, distilled])
def test_recipes_without_use_for_it_are_refused(staged, fit):
    pipe, call = staged
    online = Recipe((Rule(Site("span", 1), Gate(0.1)),))
    with pytest.raises(PlanError, match="decides online"):
        fit(pipe, ["a"], online, **call)
    extrapolating = Recipe((Rule(Site("stack"), Every(2), Taylor(1)),))
    with pytest.raises(PlanError, match="found the predictor Taylor"):
        fit(pipe, ["a"], extrapolating, **call)
    idle = Recipe((Rule(Site("stack"), Every(1), Copy()),), name="idle")
    with pytest.raises(PlanError, match="'idle' reuses nothing"):
        fit(pipe, ["a"], idle, **call)
