"""Static policies: the whole run's mask is known before the first forward."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Field

from blockcache.errors import PlanError
from blockcache.plan.policies.base import Mask, StaticPolicy
from blockcache.plan.spec import Count, spec
from blockcache.plan.steps import Step


def _same_for_all(computed: set[int], total: int, units: int) -> Mask:
    row = tuple(i in computed or i == 0 for i in range(total))
    return (row,) * units


@spec
class Every(StaticPolicy):
    """Compute every n-th step (FORA's schedule)."""

    n: Annotated[Count, Field(ge=1)] = 2

    def mask(self, steps: Sequence[Step], units: int) -> Mask:
        """Steps 0, n, 2n, ..."""
        return _same_for_all(set(range(0, len(steps), self.n)), len(steps), units)


@spec
class Geometric(StaticPolicy):
    """Compute a share of the steps, dense first, with gaps that grow geometrically.

    Needs no calibration. Searched schedules of large models have this shape: early steps decide
    the layout and change fastest.
    budget: share of the steps computed, 0 < budget <= 1, useful 0.15 to 0.6.
    """

    budget: Annotated[float, Field(gt=0, le=1)] = 0.3

    def mask(self, steps: Sequence[Step], units: int) -> Mask:
        """Computed steps 0, 1, ... with growing gaps; the last gap ends at the run's end."""
        total = len(steps)
        count = steps_of(self.budget, total)
        return _same_for_all(set(geometric_steps(count, total)), total, units)


@spec
class Bathtub(StaticPolicy):
    """Compute a share of the steps, dense at both ends.

    The gap between computed steps grows linearly to five times its first size at 60 % of the run,
    and shrinks back to it. Early steps decide the layout; what the last ones do wrong nobody makes
    good. This is the shape of the masks that searches find for corrected
    forecasts (see `Corrector`), which leave little error behind where the gaps are wide.
    budget: share of the steps computed, 0 < budget <= 1, useful 0.15 to 0.6.
    """

    budget: Annotated[float, Field(gt=0, le=1)] = 0.3

    def mask(self, steps: Sequence[Step], units: int) -> Mask:
        """Computed steps from 0 on."""
        total = len(steps)
        return _same_for_all(set(bathtub_steps(steps_of(self.budget, total), total)), total, units)


def steps_of(budget: float, total: int) -> int:
    """How many of `total` steps a share of them is, at least 1.

    Raises:
        PlanError: the budget is no share.
    """
    if not 0.0 < budget <= 1.0:
        raise PlanError(f"budget is a share of the steps, above 0 and at most 1, got {budget}")
    return max(1, round(budget * total))


def geometric_steps(count: int, total: int) -> tuple[int, ...]:
    """`count` increasing steps in 0..total-1 with gaps that grow from 1 by one ratio.

    The gap from the last of them to the end of the run counts too.
    """
    ratio = _gap_ratio(count, total)
    return _rounded(list(accumulate((ratio**k for k in range(count - 1)), initial=0.0)), total)


def _rounded(places: Sequence[float], total: int) -> tuple[int, ...]:
    """Increasing steps near increasing `places` in a run of `total`."""
    chosen: list[int] = []
    for k, exact in enumerate(places):
        # Rounding must neither repeat a step nor run out of room for those still to come.
        lowest = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(round(exact), lowest), total - (len(places) - k)))
    return tuple(chosen)


_PEAK, _WIDEST = 0.6, 5.0
"""Where in the run the gap is widest, and how wide, the first and the last gap being 1."""


def bathtub_steps(count: int, total: int) -> tuple[int, ...]:
    """`count` increasing steps in 0..total-1 with gaps that grow until late and then shrink."""
    grows, shrinks = (_WIDEST - 1) / _PEAK, (_WIDEST - 1) / (1 - _PEAK)
    # Computed steps per unit of the run are 1 / gap; its integral over both parts is a logarithm.
    until_peak = math.log(_WIDEST) / grows
    whole = until_peak + math.log(_WIDEST) / shrinks

    def place(done: float) -> float:
        if done <= until_peak:
            return (math.exp(done * grows) - 1) / grows
        return _PEAK + _WIDEST * (1 - math.exp((until_peak - done) * shrinks)) / shrinks

    return _rounded([total * place(whole * k / count) for k in range(count)], total)


def _gap_ratio(count: int, total: int) -> float:
    low, high = 1.0, float(max(total, 2))
    for _ in range(80):
        middle = (low + high) / 2
        if _reaches(middle, count, total):
            high = middle
        else:
            low = middle
    return low


def _reaches(ratio: float, count: int, total: int) -> bool:
    """Whether `count` gaps 1, ratio, ratio**2, ... add up to `total`."""
    reached, gap = 0.0, 1.0
    for _ in range(count):
        reached += gap
        gap *= ratio
        if reached >= total:
            return True
    return False


@spec
class MaskTable(StaticPolicy):
    """A mask written down: what searches produce and plan files hold.

    computed: for each unit the computed steps, increasing; a single row serves all units.
    total: steps of the run it was made for.
    sigmas: that run's noise levels, one per step. With them the table is carried over to another
    step count by noise level, without them by the fraction of the run done.
    """

    computed: tuple[tuple[int, ...], ...]
    total: Annotated[int, Field(ge=1, le=100_000)]
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check that rows are increasing steps within the run."""
        if not self.computed:
            raise ValueError("computed needs at least one row of steps")
        for row in self.computed:
            if any(b <= a for a, b in zip(row, row[1:], strict=False)):
                raise ValueError("computed steps must be increasing")
            if row and not 0 <= row[0] <= row[-1] < self.total:
                raise ValueError(f"computed steps must lie in 0..{self.total - 1}")
        if self.sigmas and len(self.sigmas) != self.total:
            raise ValueError(f"sigmas has {len(self.sigmas)} values for {self.total} steps")
        if any(b > a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError("sigmas must not rise: they are the noise levels of a run, in order")

    def mask(self, steps: Sequence[Step], units: int) -> Mask:
        """The table, carried over to `steps` if their number differs."""
        rows = self.computed
        if len(rows) not in (1, units):
            raise PlanError(f"the mask table has {len(rows)} rows for {units} units")
        target = self._carry_over(steps)
        masks = [_same_for_all({target[i] for i in row}, len(steps), 1)[0] for row in rows]
        return tuple(masks) if len(masks) == units else (masks[0],) * units

    def fits(self, steps: Sequence[Step]) -> bool:
        """Whether the table was made for exactly these steps."""
        if len(steps) != self.total:
            return False
        return not self.sigmas or all(
            abs(a - b.sigma) <= 1e-3 * max(1.0, abs(a))
            for a, b in zip(self.sigmas, steps, strict=True)
        )

    def _carry_over(self, steps: Sequence[Step]) -> list[int]:
        """For each step of the table the step of the run that stands for it."""
        if self.fits(steps):
            return list(range(self.total))
        if self.sigmas:
            by_noise = [step.sigma for step in steps]
            return [_nearest(by_noise, sigma) for sigma in self.sigmas]
        scale = len(steps) / self.total
        return [min(len(steps) - 1, round(i * scale)) for i in range(self.total)]


@spec
class Growing(StaticPolicy):
    """Compute with gaps that grow by a constant after every computed step (Spectrum's schedule).

    warmup: steps computed first. window: first gap, at least 1. growth: added to the gap after
    every computed step; the gap in force is its whole part.
    """

    warmup: Annotated[Count, Field(ge=1)] = 5
    window: Annotated[float, Field(ge=1)] = 2.0
    growth: Annotated[float, Field(ge=0)] = 0.75

    def mask(self, steps: Sequence[Step], units: int) -> Mask:
        """The warm-up, then every step that ends a gap."""
        computed = set(range(min(self.warmup, len(steps))))
        gap, last = self.window, self.warmup - 1
        while (last := last + int(gap)) < len(steps):
            computed.add(last)
            gap += self.growth
        return _same_for_all(computed, len(steps), units)


@spec
class Within(StaticPolicy):
    """Another policy in a part of the run; outside of it everything is computed.

    start, stop: `start` <= position < `stop`, positions from 0 to 1. axis: the position of a step
    is the "share" of the run that is done, or its "time", which falls from 1 to 0 (a published
    window of 100 to 800 of 1000 timesteps is 0.1 to 0.8). counting: from "here", where the inner
    policy begins at the first step inside, which is computed, or from the beginning of the "run".
    """

    policy: StaticPolicy
    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    stop: Annotated[float, Field(ge=0, le=1)] = 1.0
    axis: Literal["share", "time"] = "share"
    counting: Literal["here", "run"] = "here"

    def __post_init__(self) -> None:
        """Refuse a window without width."""
        if self.start >= self.stop:
            raise ValueError(f"the window {self.start} to {self.stop} is empty")

    def mask(self, steps: Sequence[Step], units: int) -> Mask:
        """The inner policy's mask of the steps inside, True elsewhere."""
        inside = [i for i, step in enumerate(steps) if self._holds(step)]
        counted = inside if self.counting == "here" else range(len(steps))
        inner = self.policy.mask([steps[i] for i in counted], units)
        rows = []
        for row in inner:
            wanted = dict(zip(counted, row, strict=True))
            rows.append(tuple(wanted[i] if i in inside else True for i in range(len(steps))))
        return tuple(rows)

    def _holds(self, step: Step) -> bool:
        position = step.share if self.axis == "share" else step.noise_time
        return self.start <= position < self.stop


def _nearest(values: Sequence[float], wanted: float) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - wanted))
