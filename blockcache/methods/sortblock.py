"""Sortblock (2508.00412, AAAI 2026).

Full steps at an interval; on the step after one, the blocks are sorted by how much their residual
turned between the last two, and those that turned most are computed on until the next full step.
The others extrapolate their residual linearly.

Kept: the window of timesteps, the interval, the cosine over token means of the first eighth of the
channels, the ratio's published polynomial of the timestep, separate rankings for two-stream and
one-stream blocks. Different: the authors rank a block by its last residual and its own prediction
of the next one, which measures the size of the slope alone; here it is the last two computed
residuals. And a block that is computed in between also renews its residual; theirs keeps the older
one. State: two residuals per block and branch, which is the most of all methods here; one host read
per full step.
"""

from blockcache.plan import Ranked, Recipe, Rule, Site, Taylor

RATIO = (5.676e-14, -1.367e-10, 1.162e-7, -3.977e-5, 3.61e-3, 0.5609)
"""The published polynomial of the timestep, 0 to 1000, highest power first."""


def sortblock(
    interval: int = 5, scale: float = 0.1, start: float = 0.05, stop: float = 0.9
) -> Recipe:
    """Between full steps compute only the blocks whose residual turned the most.

    interval: from one full step to the next, useful 4 to 9. scale: of the share of blocks that are
    computed in between, the paper's beta; the share is scale times 0.66 early to 0.08 late, rounded
    up to whole blocks. start, stop: timesteps between which blocks are reused at all, as shares of
    the longest.
    """
    policy = Ranked(interval, RATIO, scale, (start, stop))
    return Recipe((Rule(Site("block"), policy, Taylor(1)),), name=f"sortblock {interval}")
