"""FoCa, forecast then calibrate (2508.16211).

Features are taken as the solution of an ODE: a step of the second-order backward differentiation
formula, with the slope at its end from the last three computed payloads. Kept: the formula, (7/3,
-5/3, 1/3) one interval ahead of evenly spaced steps; the first full steps and the interval.
Different: it is the formula for variable steps. A port in wide use leaves out the division by the
gap and overshoots from an interval of 2 on. The whole stack's residual is forecast, not each
sub-layer's, unless `site` says otherwise. State: three residuals of the stack, or outputs per
sub-layer, per branch.
"""

from typing import Literal

from blockcache.plan import BackwardDifference, Growing, Recipe, Rule, Site
from blockcache.plan.recipe import each_sub_layer


def fo_ca(
    interval: int = 5, warmup: int = 3, site: Literal["sub_layers", "stack"] = "stack"
) -> Recipe:
    """Forecast what is not computed by backward differentiation.

    interval: from one full step to the next, useful 3 to 7. warmup: first full steps, at least 1.
    site: "stack", or "sub_layers", each for itself as published.
    """
    schedule = Growing(warmup, float(interval), 0.0)
    predictor = BackwardDifference()
    whole = (Rule(Site("stack"), schedule, predictor),)
    rules = whole if site == "stack" else each_sub_layer(schedule, predictor)
    return Recipe(rules, name=f"fo_ca {interval}")
