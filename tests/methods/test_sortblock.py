"""Sortblock against its rule written out."""

import math

import pytest
import torch

from blockcache import recipes
from blockcache.methods.sortblock import RATIO
from paper_toys import Transformer


def published_share(timestep, scale):
    """The published polynomial, term by term."""
    powers = [c * timestep ** (5 - n) for n, c in enumerate(RATIO)]
    return scale * sum(powers)


def by_hand(interval, scale, window):
    """Between full steps the least similar blocks run; the others extrapolate linearly."""

    def rule(model, words):
        kept = {}  # block: the last two (step, residual), newest first
        state = {"chosen": None}

        def similarity(number):
            (_, new), (_, old) = kept[number]
            a, b = (r[..., : r.shape[-1] // 8 or 1].mean(dim=(0, 1)) for r in (new, old))
            return torch.nn.functional.cosine_similarity(a, b, dim=0).item()

        def denoise(i, timestep, latents):
            temb, h = model.embed(timestep), model.tokens(latents)
            lo, hi = window
            is_inside = lo * 1000 <= timestep.item() <= hi * 1000
            has_two = all(len(kept.get(n, ())) > 1 for n in range(len(model.blocks)))
            if not is_inside or i % interval == 0 or not has_two:
                state["chosen"] = None
                running = range(len(model.blocks))
            else:
                if state["chosen"] is None:
                    count = math.ceil(published_share(timestep.item(), scale) * len(model.blocks))
                    order = sorted(range(len(model.blocks)), key=similarity)
                    state["chosen"] = order[:count]
                running = state["chosen"]
            for number, block in enumerate(model.blocks):
                if number in running:
                    out = block(h, words, temb)
                    kept[number] = [(i, out - h), *kept.get(number, [])][:2]
                    h = out
                else:
                    (t0, new), (t1, old) = kept[number]
                    h = h + new + (i - t0) / (t0 - t1) * (new - old)
            return model.output(h)

        return denoise

    return rule


@pytest.mark.parametrize(("interval", "scale"), [(5, 0.1), (4, 1.0), (9, 2.0)])
def test_the_papers_rule(agree, interval, scale):
    def make():
        return Transformer(6)

    recipe = recipes.sortblock(interval, scale)
    ours = agree(recipe, by_hand(interval, scale, (0.05, 0.9)), 30, make)
    counts = {sum(name.isdigit() for name in ran) for ran in ours.ran}
    assert counts > {6}


def test_the_published_ratio():
    """By hand at t = 500: 1.77375 - 8.54375 + 14.525 - 9.9425 + 1.805 + 0.5609 = 0.1784."""
    (rule,) = recipes.sortblock().rules
    assert published_share(500, 0.1) == pytest.approx(0.01784, abs=1e-6)
    even = [0.5] * 100
    step = type("At", (), {"noise_time": 0.5})()
    assert len(rule.policy.chosen(step, even)) == 2  # 1.78 rounded up


def test_the_defaults_are_the_papers():
    assert recipes.sortblock() == recipes.sortblock(5, 0.1, 0.05, 0.9)
