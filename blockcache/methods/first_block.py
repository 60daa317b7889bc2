"""First-block cache (ParaAttention; also diffusers' FirstBlockCache).

Run the first block; if its residual changed little since the last computed step, add the stored
residual of all other blocks to its output. Kept: the signal, the comparison with the last computed
step, the threshold. Different: the residual is added behind the last skipped block, so that what a
model adds between blocks (ControlNet) is not counted twice; guards for first and last steps and for
the longest streak; branches decide together.
State: two payloads (probe and stack residual) per branch, one host read per step.
"""

from blockcache.plan import Cooldown, Gate, MaxStreak, Predictor, Recipe, Rule, Site, Taylor, Warmup


def first_block(
    threshold: float = 0.08,
    warmup: int = 2,
    cooldown: int = 0,
    max_streak: int = 8,
    order: int = 0,
) -> Recipe:
    """Reuse all blocks but the first while its residual changes by less than `threshold`.

    threshold: relative L1 change, no unit, useful 0.03 to 0.2; 0 never reuses. warmup, cooldown:
    first and last steps always computed. max_streak: reused steps in a row at most. order: of
    the extrapolation, 0 copies as published.
    """
    predictor: Predictor = Taylor(order)
    guards = (Warmup(warmup), Cooldown(cooldown), MaxStreak(max_streak))
    rule = Rule(Site("span", 1), Gate(threshold), predictor, guards)
    return Recipe((rule,), name=f"first_block {threshold:g}")
