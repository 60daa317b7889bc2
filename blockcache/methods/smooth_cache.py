"""SmoothCache (2411.10510): each kind of sub-layer reused while its calibrated error is small.

At a computed step the longest reuse is taken for which the relative L1 error, mean over the blocks,
stays at or below a threshold all the way. Kept: one schedule per kind (self-attention,
cross-attention, MLP), the look-ahead of three steps, first and last step computed. State: one
output per sub-layer and branch.
"""

import numpy as np

from blockcache.errors import PlanError
from blockcache.plan import MaskTable, Recipe, Rule, Site
from blockcache.plan.sites import Scope
from blockcache.plan.trace import Floats, Trace

_KINDS: tuple[Scope, ...] = ("attn", "cross", "mlp")


def smooth_cache(trace: Trace, threshold: float = 0.18, reach: int = 3) -> Recipe:
    """Reuse a kind of sub-layer for as long as its error stays at or below `threshold`.

    trace: with the outputs of attn, cross and mlp. threshold: relative L1 error, useful 0.05 to
    0.4; the paper has 0.08 and 0.18 for DiT-XL with 50 steps. reach: reused steps in a row at
    most, 3 in the paper.

    Raises:
        PlanError: no sub-layers in the trace, or impossible settings.
    """
    if not 0.0 <= threshold < np.inf or reach < 1:
        raise PlanError(f"need threshold >= 0 and reach >= 1, got {threshold} and {reach}")
    total = len(trace.sigmas)
    rules = []
    for kind in _KINDS:
        errors = _errors(trace, kind)
        if errors is not None:
            table = MaskTable((_computed(errors, threshold, reach),), total, trace.sigmas)
            rules.append(Rule(Site(kind), table, payload="output"))
    if not rules:
        raise PlanError("the trace has no sub-layers; trace with scopes attn, cross and mlp")
    return Recipe(tuple(rules), name=f"smooth_cache {threshold:g}")


def _errors(trace: Trace, kind: Scope) -> Floats | None:
    """`[T, T]`: relative error at step j of what step i computed, mean over blocks and branches."""
    found = [seen.relative_l1() for b in trace.branches for _, seen in trace.each(kind, branch=b)]
    return np.asarray(np.mean(found, axis=0)) if found else None


def _computed(errors: Floats, threshold: float, reach: int) -> tuple[int, ...]:
    last = len(errors) - 1
    computed = [0]
    while computed[-1] < last:
        at = computed[-1]
        step = at + 1
        while step < last and step - at <= reach and errors[at, step] <= threshold:
            step += 1
        computed.append(step)
    return tuple(computed)
