"""DPCache (2602.22654): the path of computed steps whose forecasts are off least, by a program.

Reused features are forecast from the last two computed steps, so a stretch of reuse costs what the
forecast from those two misses, summed over the stretch. Kept: that cost on the last layer's
features, the first three and the last step computed, the longest jump. Different: the program is
exact over pairs of steps; the paper keeps one predecessor per step, which can miss the best path.
State: two stack outputs per branch.
"""

import numpy as np
from numpy.typing import NDArray

from blockcache.errors import PlanError
from blockcache.plan import MaskTable, Recipe, Rule, Site, Taylor
from blockcache.plan.paths import allowed, cheapest_forecast
from blockcache.plan.policies.static import steps_of
from blockcache.plan.trace import Floats, Trace


def dp_cache(trace: Trace, budget: float = 0.3, max_jump: float = 0.3, forced: int = 3) -> Recipe:
    """Compute `budget` of the steps, chosen so that the forecasts in between miss least.

    trace: with the output of the stack. budget: share of the steps computed, useful 0.15 to 0.6.
    max_jump: longest jump as a share of the run. forced: first steps computed in any case, the last
    one is, too.

    Raises:
        PlanError: the trace has no samples of the stack's output, or there is no such path.
    """
    features = trace.at("stack", len(trace.chains) - 1, "output").sample
    if not features.shape[2]:
        raise PlanError("the trace holds no sample of the stack's output; trace again")
    total = len(trace.sigmas)
    computed = steps_of(budget, total)
    jump = max(1, round(max_jump * total))
    costs = allowed(forecast_costs(features), (*range(min(forced, computed - 1)), -1), jump)
    table = MaskTable((cheapest_forecast(costs, computed),), total, trace.sigmas)
    rule = Rule(Site("stack"), table, Taylor(1), payload="output")
    return Recipe((rule,), name=f"dp_cache {budget:g}")


def forecast_costs(features: NDArray[np.floating]) -> Floats:
    """`[T, T, T + 1]`: sum over the steps of segment (j, k) of the error of the line through i, j.

    features: `[P, T, K]`. The error of a step is the mean of |forecast - true|. (0, 0, k) copies.
    """
    total = features.shape[1]
    values = np.ascontiguousarray(np.moveaxis(features, 1, 0), dtype=np.float32).reshape(total, -1)
    costs = np.full((total, total, total + 1), np.inf)
    for j in range(total):
        for i in range(j) if j else (0,):
            slope = (values[j] - values[i]) / max(j - i, 1)
            ahead = np.arange(1, total - j, dtype=np.float32)[:, None]
            misses = np.abs(values[j] + ahead * slope - values[j + 1 :]).mean(1)
            costs[i, j, j + 1 :] = np.concatenate([[0.0], np.cumsum(misses, dtype=np.float64)])
    return costs
