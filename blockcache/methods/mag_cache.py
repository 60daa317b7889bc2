"""MagCache (2506.09045): reuse while the residual's magnitude, by a stored curve, has hardly moved.

The ratio of successive residual norms hardly depends on the prompt. Its running product since the
last computed step says by how much a reused residual is too large; the deviations from 1 are added
up. Kept: product, sum, threshold, longest streak, retention. Different: everything in it is known
before the run, so it is compiled to a static plan; branches share one curve, their mean.
State: one stack residual per branch, no host read.
"""

import numpy as np

from blockcache.errors import PlanError
from blockcache.plan import MaskTable, Recipe, Rule, Site
from blockcache.plan.trace import Floats, Trace


def mag_cache(
    trace: Trace, threshold: float = 0.12, max_streak: int = 4, retention: float = 0.2
) -> Recipe:
    """Reuse while the summed deviation of the magnitude stays below `threshold`.

    trace: with the residual of the stack. threshold: no unit; the paper has 0.06 (Qwen-Image) to
    0.24 (FLUX). max_streak: reused steps in a row at most, 2 to 6 in the paper. retention: share of
    the run computed first.

    Raises:
        PlanError: the trace has no residual of the stack, or impossible settings.
    """
    if not 0.0 <= threshold < np.inf or max_streak < 1 or not 0.0 <= retention <= 1.0:
        raise PlanError(
            "need threshold >= 0, max_streak >= 1 and retention in 0..1, "
            f"got {threshold}, {max_streak} and {retention}"
        )
    curves = [trace.at(branch=branch).magnitude.mean(0) for branch in trace.branches]
    computed = _computed(np.mean(curves, axis=0), threshold, max_streak, retention)
    table = MaskTable((computed,), len(trace.sigmas), trace.sigmas)
    return Recipe((Rule(Site("stack"), table),), name=f"mag_cache {threshold:g}")


def _computed(
    curve: Floats, threshold: float, max_streak: int, retention: float
) -> tuple[int, ...]:
    computed = [0]
    product, error, streak = 1.0, 0.0, 0
    for step in range(1, len(curve)):
        product *= float(curve[step])
        error += abs(1.0 - product)
        streak += 1
        is_late = step >= retention * len(curve)
        if not (is_late and error < threshold and streak <= max_streak):
            computed.append(step)
            product, error, streak = 1.0, 0.0, 0
    return tuple(computed)
