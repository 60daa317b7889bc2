"""The sparse half of a recipe: which attention is thinned out, when, and within what limits."""

from typing import Annotated, Literal

from pydantic import Field

from blockcache.plan.geometry import PlannerSpec
from blockcache.plan.spec import Count, spec
from blockcache.plan.steps import Step

ShareOrCount = Annotated[float, Field(ge=0, le=10**6)]
"""Below 1 a share of all, rounded; from 1 on a count."""

Layers = ShareOrCount | tuple[Count, ...]
"""A share or a count of the first layers, or the numbers of some."""

Backend = Literal["auto", "torch", "triton", "flex", "flashinfer", "sparge"]


@spec
class Sparse:
    """Attend only to the key blocks that a planner chooses; text and cross-attention stay dense.

    planner: the method with its parameters.
    dense_steps: first steps that stay dense, a share of the run (below 1) or a count; 0.2 is what
    papers take for quality, 0.1 for speed. Early steps decide the layout.
    dense_last: last steps that stay dense.
    dense_layers: first layers that stay dense, a share or a count; or the numbers of those layers,
    from 0, for example where attention is spread over everything.
    dense_layers_steps: first steps in which they do, a share or a count; None for all. What a layer
    gathers from afar matters while the layout is decided.
    refresh: plan anew at every n-th step, whatever the planner remembers; 0 leaves it to the
    planner.
    max_density: a site whose plan keeps more than this share of the blocks is given up for some
    steps, for dense attention is faster there.
    min_length: shortest sequence worth thinning out, in tokens; None takes what was measured for
    the device.
    budget_mib: most memory for what planners remember between steps; sites that would go beyond
    stay dense. None sets no limit.
    backend: which kernel carries plans out. "auto" takes the best that is there; any other is met
    or refused, never replaced.
    """

    planner: PlannerSpec
    dense_steps: ShareOrCount = 0.2
    dense_last: Count = 0
    dense_layers: Layers = 0.03
    dense_layers_steps: ShareOrCount | None = None
    refresh: Count = 0
    max_density: Annotated[float, Field(gt=0, le=1)] = 0.6
    min_length: Count | None = None
    budget_mib: Annotated[float, Field(ge=0)] | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        """A count is a whole number."""
        for name in ("dense_steps", "dense_layers", "dense_layers_steps"):
            amount = getattr(self, name)
            is_number = amount is not None and not isinstance(amount, tuple)
            if is_number and amount >= 1 and amount != int(amount):
                raise ValueError(f"{name}: {amount} is neither a share below 1 nor a whole count")

    def dense_because(self, step: Step, layer: int, layers: int) -> str:
        """Why the schedule wants this layer dense in this step; empty where it does not."""
        if step.index < _count(self.dense_steps, step.total):
            return "first steps"
        if step.index >= step.total - self.dense_last:
            return "last steps"
        limit = self.dense_layers_steps
        if limit is not None and step.index >= _count(limit, step.total):
            return ""
        if isinstance(self.dense_layers, tuple):
            return "dense layers" * (layer in self.dense_layers)
        return "first layers" * (layer < _count(self.dense_layers, layers))

    def refreshes(self, step: Step) -> bool:
        """Whether planners are asked to plan anew in this step."""
        if not self.refresh:
            return False
        return (step.index - _count(self.dense_steps, step.total)) % self.refresh == 0


def _count(amount: float, total: int) -> int:
    return round(amount * total) if amount < 1 else int(amount)
