"""What the tests of methods share: run a recipe and a rule written out by hand side by side."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import blockcache
from paper_toys import Denoise, Transformer, Walk, text, walk
from toys import Scheduler


def run_model(model: Any, recipe: Any, steps: int) -> Walk:
    """The model with `recipe` enabled (None: as it is)."""
    scheduler, words = Scheduler(steps), text()
    if recipe is not None:
        blockcache.enable(model, recipe, scheduler=scheduler)
    try:
        return walk(model.log, lambda i, t, x: model(x, t, words), scheduler)
    finally:
        blockcache.disable(model)


@pytest.fixture
def agree() -> Callable[..., Walk]:
    """`agree(recipe, rule, steps)`: both do the same, and it is not what the plain model does.

    rule: gets an untouched model and its text, and returns what stands in for the denoiser.
    """

    def check(
        recipe: Any,
        rule: Callable[[Any, torch.Tensor], Denoise],
        steps: int = 20,
        make: Callable[[], Any] = Transformer,
    ) -> Walk:
        ours = run_model(make(), recipe, steps)
        model = make()
        theirs = walk(model.log, rule(model, text()), Scheduler(steps))
        assert ours.ran == theirs.ran
        for ours_now, theirs_now in zip(ours.outputs, theirs.outputs, strict=True):
            worst = (ours_now - theirs_now).abs().max()
            assert worst <= 1e-6 * theirs_now.abs().max(), f"off by {worst:.2e}"
        plain = run_model(make(), None, steps)
        assert sum(map(len, ours.ran)) < sum(map(len, plain.ran)), "nothing was reused"
        assert (ours.outputs[-1] - plain.outputs[-1]).abs().max() > 1e-5
        return ours

    return check
