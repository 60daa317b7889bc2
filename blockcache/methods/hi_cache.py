"""HiCache (2508.16984).

TaylorSeer with scaled Hermite polynomials in the place of the monomials, which holds the
extrapolation back. Kept: the polynomial, its scale, the first full steps and the interval.
Different: derivatives are divided differences, right at uneven gaps; the whole stack's residual is
extrapolated unless `site` says otherwise, for it costs one tensor where sub-layers cost dozens.
State: `order` + 1 residuals of the stack, or outputs per sub-layer, per branch.
"""

from typing import Literal

from blockcache.plan import Growing, Hermite, Recipe, Rule, Site
from blockcache.plan.recipe import each_sub_layer


def hi_cache(
    interval: int = 6,
    order: int = 2,
    sigma: float = 0.5,
    warmup: int = 3,
    site: Literal["sub_layers", "stack"] = "stack",
) -> Recipe:
    """Extrapolate what is not computed by scaled Hermite polynomials.

    interval: from one full step to the next, useful 3 to 7. order: 1 to 4. sigma: scale of the
    polynomials, useful 0.5 to 0.75; smaller is nearer to a copy. warmup: first full steps, at least
    1. site: "stack", or "sub_layers", each for itself as published.
    """
    schedule = Growing(warmup, float(interval), 0.0)
    predictor = Hermite(order, sigma)
    whole = (Rule(Site("stack"), schedule, predictor),)
    rules = whole if site == "stack" else each_sub_layer(schedule, predictor)
    return Recipe(rules, name=f"hi_cache {interval}/{order}")
