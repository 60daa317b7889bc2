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
    fade: let the change since the last computed step count less and less as the noise goes, in
    proportion to the time that is left. Blockcache's own: with one computed step in ten, gaps are
    so long that the full change overshoots, and most so at the end (3 dB on the embedded model).
    """

    order: Annotated[int, Field(ge=0, le=4)] = 1
    axis: Literal["step", "sigma"] = "step"
    fade: bool = False

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
        if self.fade:
            weights = [at.noise_time * weight for weight in weights]
            weights[0] += 1.0 - at.noise_time
        return tuple(weights)


def _lagrange(nodes: Sequence[float], j: int, x: float) -> float:
    """The polynomial that is 1 at node j and 0 at the others, at `x`."""
    weight = 1.0
    for k, other in enumerate(nodes):
        if k != j:
            weight *= (x - other) / (nodes[j] - other)
    return weight


@spec
class Fitted(Predictor):
    """Weights written down for one mask of one run: what fits and searches produce.

    L2P's learned rows (2604.26365), solved for exactly the steps a plan computes. Where the history
    is another one (other steps, an anchor lost), it extrapolates as `Taylor(1)`.
    anchors: for each step of the run the computed steps that its weights belong to, newest first;
    empty where it is computed. table: those weights.
    """

    anchors: tuple[tuple[int, ...], ...]
    table: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Check that both tables have the same form."""
        if [len(row) for row in self.anchors] != [len(row) for row in self.table]:
            raise ValueError("anchors and table must have as many values in every row")
        for at, row in enumerate(self.anchors):
            if any(a >= b for a, b in zip(row, (at, *row), strict=False)):
                raise ValueError(f"the anchors of step {at} must be earlier steps, newest first")

    @property
    def depth(self) -> int:
        """As many anchors as its longest row, and the two that linear extrapolation wants."""
        return max(2, *map(len, self.anchors)) if self.anchors else 2

    def weights(self, at: Step, anchors: Sequence[Step]) -> tuple[float, ...]:
        """The row of step `at` if it was made for these anchors, else linear extrapolation."""
        if at.total == len(self.anchors) and self.anchors[at.index]:
            row = self.anchors[at.index]
            if tuple(anchor.index for anchor in anchors[: len(row)]) == row:
                return self.table[at.index]
        return Taylor(1).weights(at, anchors)
