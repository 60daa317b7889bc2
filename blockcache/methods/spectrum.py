"""Spectrum (2603.01623, CVPR 2026).

Chebyshev polynomials of the step number are fitted to the computed outputs of the last block by
ridge regression, and read off ahead, mixed with a straight line; the gaps grow as the run goes on.

Kept: the basis, the ridge, the mix, the growing gaps, the output as the payload. Different: the fit
is a handful of host-side weights over the stored outputs, not a solve on the device; steps are
scaled by the run's own length, the authors' by 50; the history is limited, theirs keeps every
computed output, 14 of 50 at the defaults. State: `history` outputs of the stack per branch.
"""

from blockcache.plan import Chebyshev, Growing, Recipe, Rule, Site


def spectrum(
    warmup: int = 5,
    window: float = 2.0,
    growth: float = 0.75,
    degree: int = 4,
    ridge: float = 0.1,
    mix: float = 0.5,
    history: int = 16,
) -> Recipe:
    """Forecast the last block's output by a fit over all computed ones.

    warmup: first full steps. window: first gap in steps, at least 1. growth: added to the gap after
    each computed step; 0.75 computes 14 of 50 steps, 3 computes 10. degree, ridge: of the fit. mix:
    weight of the fit against the straight line, useful 0.5 to 1. history: outputs kept at most, one
    tensor each.
    """
    predictor = Chebyshev(degree, ridge, mix, history)
    rule = Rule(Site("stack"), Growing(warmup, window, growth), predictor, payload="output")
    return Recipe((rule,), name=f"spectrum {growth:g}")
