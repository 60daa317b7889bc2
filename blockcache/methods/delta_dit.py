"""Delta-DiT (2406.01125).

In between full steps a run of blocks is skipped and what it added last time is added again: early
in the run the rear blocks, for the front ones draw the outline; late in the run the front blocks,
for the rear ones draw the details. The fresh input of the skipped blocks keeps the new latents'
part.

Kept: both phases, the interval, the full step where the phase changes, the stored deviation, which
ends before the output norm. Different: nothing in the rule; the paper gives the number of blocks
and the gate for few models only, so both are shares. U-Nets are refused: their front blocks feed
the rear ones by skip connections. State: one residual of the skipped blocks per branch.
"""

from blockcache.plan import Every, Recipe, Rule, Site, Within


def delta_dit(interval: int = 2, gate: float = 0.6, share: float = 0.75) -> Recipe:
    """Skip the rear blocks in the first part of the run and the front blocks in the second.

    interval: from one full step to the next; the paper has 2 and 3. gate: share of the run after
    which the front blocks are skipped, 0 < gate < 1; the paper's 12 of 20 steps. share: of the
    blocks that are skipped, 0 < share < 1; about 21 of DiT-XL's 28.
    """
    early = Within(Every(interval), 0.0, gate)
    late = Within(Every(interval), gate, 1.0)
    rear, front = Site("span", 1.0 - share), Site("span", 0, share)
    return Recipe((Rule(rear, early), Rule(front, late)), name=f"delta_dit {interval}")
