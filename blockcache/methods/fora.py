"""FORA, fast-forward caching (2407.01425).

Attention and MLP outputs are computed every n-th step and repeated in between; the time modulation
around them stays fresh. Kept: all of it. Different: cross-attentions, where a model has them, are
repeated like the others. MLPs that are no module of their own (the one-stream blocks of Flux) are
computed. State: one output per sub-layer and branch. `every` is the same schedule on the whole
stack for one tensor.
"""

from blockcache.plan import Every, Recipe
from blockcache.plan.recipe import each_sub_layer


def fora(interval: int = 3) -> Recipe:
    """Repeat every attention's and MLP's output for `interval` - 1 steps.

    interval: from one full step to the next, useful 2 to 5; the paper has 3, 1 never reuses.
    """
    return Recipe(each_sub_layer(Every(interval)), name=f"fora {interval}")
