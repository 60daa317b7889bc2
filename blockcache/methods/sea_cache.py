"""SeaCache (2602.18993, CVPR 2026).

TeaCache's sum of changes without a fitted polynomial: the first block's modulated input is filtered
first, so that only the frequencies count that the noise level has resolved.

Kept: the Wiener gain from the noise level and a power law for pictures, per axis of the token grid,
its mean made 1; comparison with the step before; the sum. Different: branches decide together;
where a block modulates inside itself, the tokens that enter it are filtered, and where it is not
known how the tokens lie, every step is computed. A longest streak may be set, as the ports of the
method do (2). State: one residual and one filtered signal per branch, one host read per step.
"""

from blockcache.plan import Cooldown, Gate, MaxStreak, Recipe, Rule, Site, Taylor, Warmup


def sea_cache(
    threshold: float = 0.3,
    falloff: float = 2.0,
    warmup: int = 1,
    cooldown: int = 1,
    max_streak: int = 8,
    order: int = 0,
) -> Recipe:
    """Reuse the stack while the filtered changes of its input add up to less than `threshold`.

    threshold: summed relative L1 change, no unit; the paper has 0.3 and 0.6 for FLUX (twice and
    three times as fast), 0.19 for HunyuanVideo, 0.2 for Wan. falloff: exponent of the power law, 2
    for pictures, 3 for video. warmup, cooldown: first and last steps always computed. max_streak:
    reused steps in a row at most. order: of the extrapolation, 0 copies as published.
    """
    gate = Gate(threshold, "filtered", "previous", accumulate=True, falloff=falloff)
    guards = (Warmup(warmup), Cooldown(cooldown), MaxStreak(max_streak))
    rule = Rule(Site("stack"), gate, Taylor(order), guards)
    return Recipe((rule,), name=f"sea_cache {threshold:g}")
