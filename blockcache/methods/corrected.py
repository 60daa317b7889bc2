"""Predictor and corrector on the model's own output, dense at both ends of the run.

blockcache's own. Between computed steps the output is extrapolated; each computed step makes good
what the extrapolation did wrong since the last one, which is UniPC's corrector (2302.04867) on the
steps of the uncached run. Needs no calibration, and a sampler of Euler's kind for the corrector.
State: two outputs of the model per branch, a few channels wide, where recipes on blocks keep the
whole hidden width.
"""

from blockcache.plan import Bathtub, Corrector, Recipe, Rule, Site, Taylor


def corrected(budget: float = 0.3, fade: bool = False) -> Recipe:
    """Compute `budget` of the steps, extrapolate in between, and correct.

    budget: share of steps computed, useful 0.15 to 0.6. fade: extrapolate less as the noise goes;
    better from about 0.2 down, where gaps are long, and worse at 0.3.
    """
    how = Taylor(1, fade=fade)
    rule = Rule(Site("model"), Bathtub(budget), how, payload="output", corrector=Corrector())
    name = f"corrected {budget:g}" + (" fading" if fade else "")
    return Recipe((rule,), name=name)
