"""DBCache, dual-block caching (cache-dit).

The first blocks always run and are the probe: if their residual changed little since the last
computed step, the middle is skipped; the last blocks may always run, too, to mend the result. Kept:
the signal, the comparison, warm-up and longest streak, linear extrapolation of the middle's
residual ("calibrator"). Different: numbers of blocks and the warm-up are shares by default, the
published 8 of FLUX's 57 blocks and 8 of 50 steps; the streak ends with the first computed step;
branches decide together; text streams are extrapolated like the image's. State: the probe's
residual and `order` + 1 residuals of the middle per branch, one host read per step.
"""

from blockcache.plan import Gate, MaxStreak, Recipe, Rule, Site, Taylor, Warmup


def db_cache(
    threshold: float = 0.08,
    front: int | float = 0.14,
    back: int | float = 0,
    warmup: int | float = 0.16,
    max_streak: int = 3,
    order: int = 1,
) -> Recipe:
    """Reuse the middle blocks while the front ones' residual changes by less than `threshold`.

    threshold: relative L1 change, no unit, useful 0.05 to 0.25; 0 never reuses. front, back: blocks
    that always run, a number or a share between 0 and 1; front is at least 1. warmup: first steps
    always computed, a number or a share of the run. max_streak: reused steps in a row at most.
    order: of the extrapolation, 0 copies.
    """
    end = None if back == 0 else 1.0 - back if isinstance(back, float) else -back
    guards = (Warmup(warmup), MaxStreak(max_streak))
    rule = Rule(Site("span", front, end), Gate(threshold), Taylor(order), guards)
    return Recipe((rule,), name=f"db_cache {threshold:g}")
