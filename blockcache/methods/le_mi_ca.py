"""LeMiCa (2511.00090): the path of computed steps whose worst stretch of reuse hurts least.

Steps are nodes; the edge from i to j weighs the error of the *final* latents when only the steps
between them are reused. The path of n computed steps is the lexicographic minimax: its largest
weight is least, then its second largest. Kept: weights by real runs, lexicographic minimax, a
longest span. State: one stack residual per branch.
"""

import numpy as np

from blockcache.errors import PlanError
from blockcache.plan import MaskTable, Recipe, Rule, Site
from blockcache.plan.paths import flattest
from blockcache.plan.policies.static import steps_of
from blockcache.plan.trace import Trace


def le_mi_ca(trace: Trace, budget: float = 0.3) -> Recipe:
    """Compute `budget` of the steps, those on the path with the smallest largest error.

    trace: with the errors of single stretches, see `blockcache.tuning.runs.with_segments`. The last
    step is computed. budget: share of the steps computed, useful 0.15 to 0.6.

    Raises:
        PlanError: the trace has no segments, or there is no such path.
    """
    errors = trace.segments
    if not errors.size:
        raise PlanError(
            "the trace has no errors of segments; add them with "
            "blockcache.tuning.runs.with_segments(pipe, trace)"
        )
    total = len(errors)
    computed = steps_of(budget, total)
    costs = np.full((total, total + 1), np.inf)
    costs[:, :total] = np.where(np.isnan(errors), np.inf, errors)
    # Nothing is reused between neighbours, nor behind the last step.
    costs[np.arange(total), np.arange(1, total + 1)] = 0.0
    table = MaskTable((flattest(costs, computed),), total, trace.sigmas)
    return Recipe((Rule(Site("stack"), table),), name=f"le_mi_ca {budget:g}")
