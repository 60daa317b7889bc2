"""L2P (2604.26365): the model's output as a fitted combination of earlier outputs.

For every reused step the weights with the least squared error over the traced runs. Kept: the
output of the denoiser as the payload, one row of scalars per step. Different: the rows are solved
in closed form from the trace's Gram matrix, not learnt by gradient descent, and combine computed
outputs only, since predicted ones lie in their span; the computed steps are front-loaded
geometrically like the published lists, which exist for 50 steps only.
State: `history` model outputs per branch, a few MB.
"""

from blockcache.errors import PlanError
from blockcache.plan import Fitted, MaskTable, Recipe, Rule, Site
from blockcache.plan.policies.static import geometric_steps, steps_of
from blockcache.plan.trace import Trace


def l2p(trace: Trace, budget: float = 0.3, history: int = 6, ridge: float = 1e-5) -> Recipe:
    """Compute `budget` of the steps and fit the others to them.

    trace: with the output of the model. budget: share of the steps computed, useful 0.15 to 0.6.
    history: outputs combined at most. ridge: pull towards copying the last one, no unit.

    Raises:
        PlanError: the trace has no model output, or impossible settings.
    """
    if history < 1 or ridge < 0.0:
        raise PlanError(f"need history >= 1 and ridge >= 0, got {history} and {ridge}")
    outputs = trace.at("model", 0, "output")
    total = len(trace.sigmas)
    computed = geometric_steps(steps_of(budget, total), total)
    anchors, weights = [], []
    for step in range(total):
        row = tuple(s for s in reversed(computed) if s < step)[:history]
        if step in computed:
            row = ()
        anchors.append(row)
        weights.append(outputs.best_weights(step, row, ridge) if row else ())
    table = MaskTable((computed,), total, trace.sigmas)
    fitted = Fitted(tuple(anchors), tuple(weights))
    rule = Rule(Site("model"), table, fitted, payload="output")
    return Recipe((rule,), name=f"l2p {budget:g}")
