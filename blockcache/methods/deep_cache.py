"""DeepCache (2312.00858, CVPR 2024).

In a U-Net the outermost blocks see the latents at full resolution and change with every step; the
deep inside changes slowly. In between full steps only the outermost blocks run, joined by their own
skip connections, and the output of everything deeper is repeated.

Kept: the uniform interval, the repeated output of the deep branch. Different: the cut is between
blocks; the paper may also cut between the layers of one block. The non-uniform schedules are left
out. Only the one tensor that is read is stored, where the authors' code keeps every layer's output.
For U-Nets only: in a chain of blocks nothing joins the outer ones. State: one output per branch.
"""

from blockcache.plan import Every, Recipe, Rule, Site


def deep_cache(interval: int = 3, outer: int = 1) -> Recipe:
    """Repeat the inside of a U-Net for `interval` - 1 steps.

    interval: from one full step to the next, useful 2 to 5. outer: blocks at each end that are
    always computed, at least 1; more is slower and nearer to the uncached picture.
    """
    rule = Rule(Site("deep", outer, -outer), Every(interval), payload="output")
    return Recipe((rule,), name=f"deep_cache {interval}")
