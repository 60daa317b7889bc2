"""Block Caching, "Cache Me if You Can" (2312.03209): every block on a schedule of its own.

A block is reused while the changes of its residual from step to step, added up since it was last
computed, stay below one threshold for all blocks. Kept: the measure, the sum, the one threshold;
on U-Nets the transformer blocks, as in the paper. Different: on transformers the residual of the
whole block, which the paper's attention branch is not split into. What is reused can be corrected
per channel, `blockcache.scale_shift` (least squares) or `blockcache.distilled` (the paper's).
State: one residual per block and branch.
"""

import numpy as np

from blockcache.errors import PlanError
from blockcache.plan import MaskTable, Recipe, Rule, Site
from blockcache.plan.sites import Scope
from blockcache.plan.trace import Floats, Trace


def block_caching(trace: Trace, threshold: float = 0.5) -> Recipe:
    """Reuse each block until its summed relative change exceeds `threshold`.

    trace: with the residuals of blocks (of a U-Net: of transformers). threshold: relative L1
    change, summed over steps; useful 0.05 to 1, the paper has 0.5 for latent diffusion with 50
    steps.

    Raises:
        PlanError: the trace has no blocks, or an impossible threshold.
    """
    if not 0.0 <= threshold < np.inf:
        raise PlanError(f"threshold must be 0 or larger and finite, got {threshold}")
    scope: Scope = "transformer" if trace.unet else "block"
    changes = _changes(trace, scope)
    rows = tuple(_computed(row, threshold) for row in changes)
    table = MaskTable(rows, len(trace.sigmas), trace.sigmas)
    return Recipe((Rule(Site(scope), table),), name=f"block_caching {threshold:g}")


def _changes(trace: Trace, scope: Scope) -> Floats:
    """`[blocks, T]`: |C(t) - C(t-1)| / |C(t)| of each block's residual, mean over the branches."""
    found = [
        [np.diagonal(seen.relative_l1(), offset=1) for _, seen in trace.each(scope, "residual", b)]
        for b in trace.branches
    ]
    if not found[0]:
        raise PlanError(f"the trace has no residuals of scope {scope!r}; trace with that scope")
    changes = np.asarray(found).mean(0)
    return np.concatenate([np.zeros((len(changes), 1)), changes], axis=1)


def _computed(changes: Floats, threshold: float) -> tuple[int, ...]:
    computed, total = [0], 0.0
    for step in range(1, len(changes)):
        total += float(changes[step])
        if total > threshold:
            computed.append(step)
            total = 0.0
    return tuple(computed)
