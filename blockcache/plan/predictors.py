"""Predictors: weights over the stored history.

Every published forecaster is y(t) = sum_j w_j y(t_j) over the last computed steps, newest first;
a predictor is the function that gives the weights. They are host-side floats, so one kernel
serves all predictors.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from blockcache.plan.spec import spec
from blockcache.plan.steps import Step


class Predictor:
    """Base class. `depth` is the number of computed steps it wants to look back on."""

    @property
    def depth(self) -> int:
        """History length; fewer anchors are accepted."""
        raise NotImplementedError

    def weights(self, at: Step, anchors: Sequence[Step]) -> tuple[float, ...]:
        """One weight per anchor (newest first, at least one) for the payload at step `at`."""
        raise NotImplementedError


@spec
class Copy(Predictor):
    """The last computed payload, unchanged."""

    @property
    def depth(self) -> int:
        """One anchor."""
        return 1

    def weights(self, at: Step, anchors: Sequence[Step]) -> tuple[float, ...]:
        """All weight on the newest anchor."""
        return (1.0,)


@spec
class Taylor(Predictor):
    """The polynomial of degree `order` through the last order + 1 computed payloads.

    TaylorSeer (2503.06923) in Newton's form, which is right at uneven gaps; with fewer anchors
    the degree is lower, so it works from the second computed step on. order 1 is the linear
    extrapolation that gains 3 to 8 dB over copying; order 2 overshoots on long gaps.
    axis: "step" counts sampler steps, "sigma" uses the noise level as the abscissa.
    """

    order: Annotated[int, Field(ge=0, le=4)] = 1
    axis: Literal["step", "sigma"] = "step"

    @property
    def depth(self) -> int:
        """One anchor more than the order."""
        return self.order + 1

    def weights(self, at: Step, anchors: Sequence[Step]) -> tuple[float, ...]:
        """Lagrange's basis of the anchors, evaluated at `at`."""

        def abscissa(step: Step) -> float:
            return step.sigma if self.axis == "sigma" else float(step.index)

        nodes = [abscissa(step) for step in anchors[: self.depth]]
        # Samplers of second order visit a noise level twice; the older visit then has no say.
        telling = [j for j, node in enumerate(nodes) if node not in nodes[:j]]
        distinct = [nodes[j] for j in telling]
        weights = [0.0] * len(nodes)
        for k, j in enumerate(telling):
            weights[j] = _lagrange(distinct, k, abscissa(at))
        return tuple(weights)


def _lagrange(nodes: Sequence[float], j: int, x: float) -> float:
    """The polynomial that is 1 at node j and 0 at the others, at `x`."""
    weight = 1.0
    for k, other in enumerate(nodes):
        if k != j:
            weight *= (x - other) / (nodes[j] - other)
    return weight
