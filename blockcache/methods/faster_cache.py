"""FasterCache (2410.19355): its attention part.

From some step on attention is computed every n-th step and in between continued by a damped
difference of the last two computed outputs. Kept: the damped extrapolation, its weight (0.3 as for
CogVideoX; Open-Sora's grows from 0 to 0.9), the first step, the steps counted from the run's
beginning. Different: cross-attentions, where a model has them apart, are continued as well. The
stored outputs are never overwritten, so a weight cannot compound within a streak.

Left out is the other half, which replaces the unconditional call by the conditional one's output
plus stored differences of low and high frequencies: branches share no state here, most pipelines
hand both to the denoiser as one batch, and the difference would have to be kept behind the denoiser
for every sampler. The published code also multiplies that difference in place, so its factor 1.1
grows to 1.1^k. State: two outputs per attention and branch.
"""

from blockcache.plan import Damped, Every, Recipe, Rule, Site, Within


def faster_cache(
    interval: int = 3, start: float = 0.36, weight: float = 0.3, last_weight: float | None = None
) -> Recipe:
    """Continue attention outputs by a damped difference between computed steps.

    interval: from one computed attention to the next, useful 2 to 4. start: part of the run before
    which everything is computed, 0 to 1; the paper's 18 of 50 steps. weight: of the difference, 0
    copies, 1 is linear one gap ahead. last_weight: what the weight has grown to at the end of the
    run; the same if not given.
    """
    policy = Within(Every(interval), start, 1.0, counting="run")
    predictor = Damped(weight, weight if last_weight is None else last_weight)
    attn, cross = (
        Rule(Site(scope), policy, predictor, payload="output") for scope in ("attn", "cross")
    )
    return Recipe((attn, cross), name=f"faster_cache {interval}")
