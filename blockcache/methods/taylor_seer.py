"""TaylorSeer (2503.06923, ICCV 2025).

Every attention and MLP output is stored at the full steps and extrapolated by a Taylor polynomial
over the step number in between; the time modulation around it stays fresh.

Kept: the payloads, the first full steps, the interval counted from the last of them. Different: the
derivatives are divided differences, so that the polynomial goes through the stored outputs; the
published recursion divides every order by the newest gap and takes the slope from one side, which
is the same for order 1 and misses even a parabola for order 2. `site="stack"` is the authors' lite
form: one residual of the whole stack. State: `order` + 1 outputs per sub-layer, or residuals of the
stack, per branch.
"""

from typing import Literal

from blockcache.plan import Growing, Recipe, Rule, Site, Taylor
from blockcache.plan.recipe import each_sub_layer


def taylor_seer(
    interval: int = 6,
    order: int = 1,
    warmup: int = 3,
    site: Literal["sub_layers", "stack"] = "sub_layers",
) -> Recipe:
    """Extrapolate what is not computed by a polynomial of degree `order`.

    interval: from one full step to the next, useful 3 to 7. order: 0 to 4; beyond 1 long gaps
    overshoot. warmup: first full steps, at least 1. site: "sub_layers", each for itself as
    published, or "stack".
    """
    schedule = Growing(warmup, float(interval), 0.0)
    predictor = Taylor(order)
    whole = (Rule(Site("stack"), schedule, predictor),)
    rules = whole if site == "stack" else each_sub_layer(schedule, predictor)
    return Recipe(rules, name=f"taylor_seer {interval}/{order}")
