"""BAC, block-wise adaptive caching for diffusion policies (2506.13456, ICLR 2026).

Every self-attention, cross-attention and MLP has update steps of its own. An exact dynamic program
chooses them so that what is reused is as similar as can be to what would have been computed
(Adaptive Caching Scheduler). Then the sub-layers that change most also update whenever any later
MLP does, for an MLP that refreshes on stale inputs keeps a wrong output (Bubbling Union Algorithm).

Kept: the objective, the union, the choice of sub-layers to bubble to: the mean L1 distance between
all pairs of steps. The paper's text writes the similarity of neighbouring steps where it speaks of
"cached and skipped" ones, and its sum would make the program a mere sorting; the authors' code
takes the similarity of the step that was computed and the one that reuses it, and so does this.
Different from that code, which also computes the last step everywhere and bubbles only if two or
more sub-layers were chosen; both are left to the plan. State: one output per sub-layer and branch.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockcache.errors import PlanError
from blockcache.plan import MaskTable, Recipe, Rule, Site
from blockcache.plan.paths import bubbled, cheapest, segments
from blockcache.plan.sites import Scope
from blockcache.plan.trace import SiteTrace, Trace

Metric = Literal["cosine", "l1", "mse"]

_SCOPES: tuple[Scope, ...] = ("attn", "cross", "mlp")
"""In the order in which a block calls them."""


def bac(trace: Trace, updates: int = 10, bubbles: int = 3, metric: Metric = "cosine") -> Recipe:
    """Each sub-layer on the schedule that keeps its reused outputs most similar to its true ones.

    trace: of a few runs, with the outputs of "attn", "cross" and "mlp"; its first branch is used.
    updates: steps at which each sub-layer is computed, the first among them; the paper has 5 to 20
    of 100. bubbles: how many sub-layers follow the later MLPs, 0 switches that off; the paper has 3
    and 5. metric: what is compared: the cosine, or the distance l1 or mse.

    Raises:
        PlanError: no sub-layers in the trace, more updates than steps, or an impossible setting.
    """
    if metric not in ("cosine", "l1", "mse"):
        raise PlanError(f"unknown metric {metric!r} (known: cosine, l1, mse)")
    units = _sub_layers(trace)
    if not 0 <= bubbles <= len(units):
        raise PlanError(f"bubbles must lie in 0..{len(units)}, the number of sub-layers")
    rows = [cheapest(segments(_costs(unit.seen, metric)), updates) for unit in units]
    changes = [_change(unit.seen) for unit in units]
    most_changing = sorted(range(len(units)), key=lambda i: -changes[i])[:bubbles]
    mlps = [i for i, unit in enumerate(units) if unit.scope == "mlp"]
    rows = list(bubbled(rows, most_changing, mlps))
    rules = []
    for scope in _SCOPES:
        own = tuple(row for row, unit in zip(rows, units, strict=True) if unit.scope == scope)
        if own:
            table = MaskTable(own, len(trace.sigmas), trace.sigmas)
            rules.append(Rule(Site(scope), table, payload="output"))
    return Recipe(tuple(rules), name=f"bac {updates}+{bubbles}")


class _SubLayer(NamedTuple):
    number: int
    scope: Scope
    seen: SiteTrace


def _sub_layers(trace: Trace) -> list[_SubLayer]:
    """Every sub-layer in the trace, in calling order."""
    units = [_SubLayer(i, scope, seen) for scope in _SCOPES for i, seen in trace.each(scope)]
    if not units:
        known = ", ".join(sorted({place.scope for place in trace.sites})) or "nothing"
        raise PlanError(f"bac needs a trace of {', '.join(_SCOPES)}; this one has {known}")
    return sorted(units, key=lambda unit: (unit.number, _SCOPES.index(unit.scope)))


def _costs(site: SiteTrace, metric: Metric) -> NDArray[np.float64]:
    """`[T, T]`: what it costs to reuse at step k the output of step i."""
    if metric == "cosine":
        return -site.cosine()
    if metric == "l1":
        return np.asarray(site.l1.mean(0))
    gram = site.mean_gram()
    sizes = np.diagonal(gram)
    return np.asarray(sizes[:, None] + sizes[None, :] - 2 * gram)


def _change(site: SiteTrace) -> float:
    """L1 distance between the outputs of two steps, mean over all pairs of steps."""
    return float(site.l1.mean()) * site.numel
