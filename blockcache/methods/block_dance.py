"""BlockDance (2503.15927, CVPR 2025).

In the later part of the run the front blocks, which carry structure, hardly differ from one step to
the next: in every group of steps all but the first take over the hidden state behind them and
compute the rear blocks only. Kept: the window, the groups, the stored hidden state (not a residual:
the fresh latents have no say in the skipped part), block 0, which always runs. Different: how deep
is a share of the blocks, the published 20 of 28. The learned per-sample decisions of the paper's
second half need a trained network and are left out. U-Nets are refused: their front blocks feed the
rear ones by skip connections. State: one hidden state per branch.
"""

from blockcache.plan import Every, Recipe, Rule, Site, Within


def block_dance(
    group: int = 2, start: float = 0.4, stop: float = 0.95, depth: int | float = 0.71
) -> Recipe:
    """Take over the front blocks' hidden state within groups of steps.

    group: steps that share one hidden state, useful 2 to 4. start, stop: part of the run in which
    this is done, 0 to 1. depth: up to which block, a number or a share between 0 and 1.
    """
    policy = Within(Every(group), start, stop)
    rule = Rule(Site("span", 1, depth), policy, payload="output")
    return Recipe((rule,), name=f"block_dance {group}")
