"""Compute every n-th step, copy in between: FORA's schedule (2407.01425) on the whole stack.

Kept: the uniform interval. Different: the residual of the stack is stored, one tensor per branch,
instead of every attention and MLP output. State: `order + 1` stack residuals per branch.
"""

from blockcache.plan import Every, Recipe, Rule, Site, Taylor


def every(n: int = 2, order: int = 0) -> Recipe:
    """Compute steps 0, n, 2n, ...

    n: interval, 1 never reuses. order: of the extrapolation, 0 copies.
    """
    return Recipe((Rule(Site("stack"), Every(n), Taylor(order)),), name=f"every {n}")
