"""Published forecasters beside Taylor's: other weights over the same history."""

import base64
import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from blockcache.errors import PlanError
from blockcache.plan.predictors import Copy, Predictor, Taylor
from blockcache.plan.spec import Count, spec
from blockcache.plan.steps import Step


def divided_differences(nodes: Sequence[float]) -> NDArray[np.float64]:
    """Newton's divided differences over `nodes` as weights `[order, anchor]`.

    Row n times the payloads is the n-th divided difference of the newest n + 1 of them, which is
    the n-th derivative over n! up to a term of the gaps' order, at uneven gaps too.
    """
    count = len(nodes)
    table = np.zeros((count, count))
    column = np.eye(count)
    for order in range(count):
        table[order] = column[0]
        spans = [nodes[i] - nodes[i + order + 1] for i in range(count - order - 1)]
        column = np.stack([(column[i] - column[i + 1]) / s for i, s in enumerate(spans)] or [[]])
    return table


def _positions(at: Step, anchors: Sequence[Step]) -> list[float]:
    """Step numbers of the anchors, relative to the newest."""
    return [float(anchor.index - anchors[0].index) for anchor in anchors]


@spec
class Damped(Predictor):
    """Linear extrapolation held back: `y0 + w * (y0 - y1)`, whatever the gap.

    FasterCache's (2410.19355). w grows from `start` at the run's beginning to `end` at its end.
    """

    start: Annotated[float, Field(ge=0, le=2)] = 0.3
    end: Annotated[float, Field(ge=0, le=2)] = 0.3

    @property
    def depth(self) -> int:
        """Two anchors."""
        return 2

    def weights(self, at: Step, anchors: Sequence[Step]) -> tuple[float, ...]:
        """`(1 + w, -w)`, or a copy of the only anchor."""
        if len(anchors) < 2:
            return (1.0,)
        w = self.start + (self.end - self.start) * at.share
        return (1.0 + w, -w)


@spec
class Hermite(Predictor):
    """Scaled Hermite polynomials in the place of Taylor's monomials, which damps the forecast.

    HiCache (2508.16984): `y0 + sum_n sigma**n / n! * H_n(sigma * k) * D_n` with the physicists' H_n
    and D_n the n-th derivative by divided differences (the paper's own recursion divides by the
    newest gap alone, which is wrong at uneven gaps; at even ones both agree). Order 1 is Taylor's
    with the slope times 2 sigma**2; order 2 does not pass through the newest payload.
    """

    order: Annotated[int, Field(ge=1, le=4)] = 2
    sigma: Annotated[float, Field(gt=0, le=1)] = 0.5

    @property
    def depth(self) -> int:
        """One anchor more than the order."""
        return self.order + 1

    def weights(self, at: Step, anchors: Sequence[Step]) -> tuple[float, ...]:
        """The polynomial's weights at `at`."""
        used = anchors[: self.depth]
        table = divided_differences(_positions(at, used))
        distance = float(at.index - used[0].index)
        total = table[0].copy()
        for n in range(1, len(used)):
            basis = np.polynomial.hermite.hermval(self.sigma * distance, [0.0] * n + [1.0])
            # D_n is n! times the divided difference, so the paper's 1 / n! falls out.
            total += self.sigma**n * basis * table[n]
        return tuple(map(float, total))


@spec
class BackwardDifference(Predictor):
    """Second-order backward differentiation: features as the solution of an ODE.

    FoCa (2508.16211). The step from the newest anchor to `at` is BDF2 with variable step size; for
    the slope at its end stands that of the parabola through the last three anchors at the newest.
    With even gaps one interval ahead the weights are (7/3, -5/3, 1/3). Two anchors give the line.
    """

    @property
    def depth(self) -> int:
        """Three anchors."""
        return 3

    def weights(self, at: Step, anchors: Sequence[Step]) -> tuple[float, ...]:
        """Variable-step BDF2's weights."""
        used = anchors[:3]
        if len(used) < 3:
            return Taylor(1).weights(at, used)
        table = divided_differences(_positions(at, used))
        near = float(used[0].index - used[1].index)
        ahead = float(at.index - used[0].index)
        slope = table[1] + near * table[2]
        ratio = ahead / near
        newest, older = np.eye(3)[0], np.eye(3)[1]
        total = (1 + ratio) ** 2 * newest - ratio**2 * older + ahead * (1 + ratio) * slope
        return tuple(map(float, total / (1 + 2 * ratio)))


@spec
class Chebyshev(Predictor):
    """Ridge regression of Chebyshev polynomials on the whole history, mixed with a line.

    Spectrum (2603.01623). degree: of the fit. ridge: its penalty. mix: weight of the fit, the rest
    goes to the line through the last two anchors. history: anchors kept at most; the paper keeps
    all, which is a stack residual each.
    """

    degree: Annotated[int, Field(ge=1, le=8)] = 4
    ridge: Annotated[float, Field(gt=0)] = 0.1
    mix: Annotated[float, Field(ge=0, le=1)] = 0.5
    history: Annotated[Count, Field(ge=2, le=64)] = 8

    @property
    def depth(self) -> int:
        """As many as are kept."""
        return self.history

    def weights(self, at: Step, anchors: Sequence[Step]) -> tuple[float, ...]:
        """`phi(at)^T (Phi^T Phi + ridge I)^-1 Phi^T`, solved on the host."""
        line = np.zeros(len(anchors))
        linear = Taylor(1).weights(at, anchors)
        line[: len(linear)] = linear
        design = self._basis([anchor.index for anchor in anchors], at.total)
        gram = design.T @ design + self.ridge * np.eye(self.degree + 1)
        fit = self._basis([at.index], at.total)[0] @ np.linalg.solve(gram, design.T)
        return tuple(map(float, self.mix * fit + (1 - self.mix) * line))

    def _basis(self, indices: Sequence[int], total: int) -> NDArray[np.float64]:
        """Chebyshev polynomials `[len(indices), degree + 1]` of the step, scaled to -1..1."""
        places = np.array([2.0 * i / total - 1.0 for i in indices])
        basis: NDArray[np.float64] = np.polynomial.chebyshev.chebvander(places, self.degree)
        return basis


@spec
class ProbeRatio(Predictor):
    """On the line through the last two anchors, where the probe stands on its own such line.

    DiCache (2508.17356): `y1 + g * (y0 - y1)` with g the probe's distance from its older anchor
    over the distance of the anchors, held between `least` and `most`. g = 1 copies. Needs a gate
    with a probe; g stays on the device.
    """

    least: Annotated[float, Field(ge=0)] = 1.0
    most: Annotated[float, Field(ge=0)] = 1.5

    @property
    def depth(self) -> int:
        """Two anchors."""
        return 2

    def weights(self, at: Step, anchors: Sequence[Step]) -> tuple[float, ...]:
        """What holds where no probe is at hand: a copy of the newest anchor."""
        return Copy().weights(at, anchors)


@spec
class ChannelTable:
    """Scales and shifts of one stream, `[units, steps, 2, channels]`, as base64 of fp16."""

    stream: str
    shape: tuple[int, int, int, int]
    values: str

    def __post_init__(self) -> None:
        """Refuse data that does not fill the shape."""
        try:
            size = len(base64.b64decode(self.values, validate=True))
        except ValueError:
            raise ValueError(f"the table of stream {self.stream!r} is not base64") from None
        if self.shape[2] != 2 or min(self.shape) < 1 or size != 2 * math.prod(self.shape):
            raise ValueError(f"the table of stream {self.stream!r} does not fill {self.shape}")

    @classmethod
    def of(cls, stream: str, values: NDArray[np.floating]) -> "ChannelTable":
        """Pack `[units, steps, 2, channels]`.

        Raises:
            PlanError: values beyond fp16, or not four dimensions.
        """
        with np.errstate(over="ignore"):
            packed = np.asarray(values).astype("<f2")
        if packed.ndim != 4 or not np.isfinite(packed).all():
            raise PlanError("scales and shifts must be finite in fp16 and have four dimensions")
        a, b, c, d = packed.shape
        return cls(stream, (a, b, c, d), base64.b64encode(packed.tobytes()).decode())

    def array(self) -> NDArray[np.float32]:
        """The table in fp32."""
        raw = np.frombuffer(base64.b64decode(self.values), dtype="<f2")
        return raw.reshape(self.shape).astype(np.float32)


@spec
class ScaleShift(Predictor):
    """The last computed payload, scaled and shifted per channel.

    Block Caching's correction (2312.03209), fitted in closed form or distilled; see
    `methods/block_caching.py`. Steps that were not fitted hold scale 1 and shift 0. Streams without
    a table are copied.
    """

    tables: tuple[ChannelTable, ...]

    @property
    def depth(self) -> int:
        """One anchor."""
        return 1

    def weights(self, at: Step, anchors: Sequence[Step]) -> tuple[float, ...]:
        """All weight on the newest anchor; scale and shift come after."""
        return (1.0,)
