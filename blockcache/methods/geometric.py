"""Front-loaded static schedule with linear extrapolation of the whole stack's residual.

Not one paper's method: the shape that searched schedules share (a study of ten methods and of all
1.37 million ways to compute 9 of 50 FLUX steps, "Golden Path", 2026), with TaylorSeer's first-order
prediction (2503.06923) applied at the end of the stack instead of per module. Needs no calibration.
State: `order + 1` stack residuals per branch.
"""

from blockcache.plan import Cooldown, Geometric, Recipe, Rule, Site, Taylor


def geometric(budget: float = 0.3, order: int = 1, cooldown: int = 0) -> Recipe:
    """Compute `budget` of the steps, dense first, and extrapolate in between.

    budget: share of steps computed, useful 0.15 to 0.6. order: of the extrapolation, 0 copies.
    cooldown: last steps always computed.
    """
    guards = (Cooldown(cooldown),) if cooldown else ()
    rule = Rule(Site("stack"), Geometric(budget), Taylor(order), guards)
    return Recipe((rule,), name=f"geometric {budget:g}")
