"""AdaCache (2411.02397).

At every computed step the change of one block in the middle, per step since the last computed one,
is looked up in a table that says how many steps to reuse. Kept: the measure, the table's published
values, the full steps at both ends. Different: the whole stack's residual is reused, one tensor
where the paper stores each sub-layer's; the block's residual is measured in place of its temporal
attention, which few models have apart. The motion regulariser is left out: it weighs differences
between latent frames, which a picture has not, and its published code divides by a constant that
its text does not. State: one residual of the stack and one of the block per branch, one host read
per computed step.
"""

from blockcache.plan import Codebook, Cooldown, Recipe, Rule, Site, Warmup

FAST = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2))
"""The published table for 30 steps: change below, steps until the next computed one."""


def ada_cache(
    table: tuple[tuple[float, int], ...] = FAST,
    block: float = 0.5,
    warmup: int = 2,
    cooldown: int = 2,
) -> Recipe:
    """Set the date of the next computed step by how fast one block changes.

    table: pairs (relative L1 change per step, steps until the next computed one), increasing;
    larger changes mean the next step. block: which block is measured, a share of the depth. warmup,
    cooldown: first and last steps always computed.
    """
    guards = (Warmup(warmup), Cooldown(cooldown))
    rule = Rule(Site("stack"), Codebook(table, block), guards=guards)
    return Recipe((rule,), name="ada_cache")
