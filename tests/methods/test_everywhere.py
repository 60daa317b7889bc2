"""Every recipe on every tiny pipeline: it runs and reuses, or says why it cannot."""

import pytest
import torch

import blockcache
import tiny_pipelines
from blockcache import PlanError, recipes
from paper_toys import ready_recipes

STEPS = 5
# The defaults are for runs of 20 steps and more; here everything has to happen in five.
SHORT = {
    "ada_cache": {"table": ((10.0, 2),), "warmup": 1, "cooldown": 1},
    "block_dance": {"start": 0.2, "stop": 0.99},
    "db_cache": {"threshold": 9.0, "warmup": 1},
    "di_cache": {"threshold": 9.0},
    "easy_cache": {"threshold": 9.0, "warmup": 2},
    "faster_cache": {"interval": 2, "start": 0.2},
    "first_block": {"threshold": 9.0, "warmup": 1},
    "fo_ca": {"interval": 2, "warmup": 1},
    "golden_path": {"computed": 9},
    "hi_cache": {"interval": 2, "warmup": 1},
    "pab": {"cross": 3, "start": 0.01, "stop": 0.99},
    "sea_cache": {"threshold": 9.0},
    "sortblock": {"interval": 4, "start": 0.0, "stop": 1.0},
    "spe_ca": {"threshold": 9.0, "decay": 1.0, "warmup": 1},
    "spectrum": {"warmup": 1},
    "taylor_seer": {"interval": 2, "warmup": 1},
    "tea_cache": {"threshold": 9.0},
}
A_CHAIN = "a 'deep' site is the inside of a U-Net.*this model is a plain chain of blocks"
A_UNET = r"does not fit a U-Net: block \d also feeds block \d by a skip connection"


def refusal(recipe, pipeline):
    """What the error has to say where a method does not apply, else None."""
    if recipe == "deep_cache":
        return None if pipeline == "sd15" else A_CHAIN
    is_front = recipe in ("delta_dit", "block_dance", "spe_ca")
    return A_UNET if is_front and pipeline == "sd15" else None


@pytest.fixture(scope="module")
def built():
    """Pipeline, its arguments and the uncached result, each made once."""
    made = {}

    def get(name):
        if name not in made:
            pipe, kwargs = tiny_pipelines.BUILDERS[name]()
            made[name] = (pipe, kwargs, result(pipe, kwargs))
        return made[name]

    return get


def result(pipe, kwargs):
    return torch.as_tensor(tiny_pipelines.generate(pipe, kwargs, STEPS, 0, True))


@pytest.mark.parametrize("recipe", ready_recipes())
@pytest.mark.parametrize("pipeline", tiny_pipelines.BUILDERS)
def test_it_runs_or_says_why_not(pipeline, recipe, built, caplog):
    pipe, kwargs, plain = built(pipeline)
    why = refusal(recipe, pipeline)
    if why:
        with pytest.raises(PlanError, match=why):
            blockcache.enable(pipe, recipe)
        return
    blockcache.enable(pipe, recipes.by_name(recipe, **SHORT.get(recipe, {})))
    first, second = result(pipe, kwargs), result(pipe, kwargs)
    figures = blockcache.summary(pipe).as_dict()
    blockcache.disable(pipe)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    for branch in figures["branches"]:
        assert branch["reused"] or branch["part_calls_reused"], "nothing was reused"
        assert branch["steps"] == STEPS
    assert figures["reasons"] == {}
    assert "left out" not in caplog.text
    assert torch.equal(result(pipe, kwargs), plain)


@pytest.mark.parametrize("recipe", ready_recipes())
def test_it_can_be_enabled_by_name(recipe, built):
    """With its defaults, at more steps, on the model that it is for."""
    pipe, kwargs, _ = built("sd15" if recipe == "deep_cache" else "flux")
    blockcache.enable(pipe, recipe)
    assert blockcache.summary(pipe).as_dict()["recipe"].startswith(recipe)
    blockcache.disable(pipe)
