"""PAB, pyramid attention broadcast (2408.12588).

In the middle of the run attention changes little, and cross-attention least: each kind's output is
repeated over a range of steps of its own. Kept: the ranges, the window of timesteps, counting from
the beginning of the run. Different: the paper has a third range for the temporal attention of
models that attend space and time apart; a joint attention counts as spatial, as in the paper's
CogVideoX. Its MLPs, repeated at three timesteps in five blocks of Open-Sora, are computed. State:
one output per attention and branch. Under sequence parallelism a repeated attention needs no
communication.
"""

from blockcache.plan import Every, Recipe, Rule, Site, Within
from blockcache.plan.sites import Scope


def pab(attn: int = 2, cross: int = 6, start: float = 0.1, stop: float = 0.85) -> Recipe:
    """Repeat attention outputs over `attn` steps and cross-attention outputs over `cross`.

    attn, cross: steps from one computed attention to the next, useful 2 to 8. start, stop:
    timesteps between which this is done, as shares of the longest; the paper's 100 to 850 of 1000.
    """
    scopes: tuple[tuple[Scope, int], ...] = (("attn", attn), ("cross", cross))
    self_rule, cross_rule = (
        Rule(Site(scope), Within(Every(n), start, stop, "time", "run"), payload="output")
        for scope, n in scopes
    )
    return Recipe((self_rule, cross_rule), name=f"pab {attn}/{cross}")
