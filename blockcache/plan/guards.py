"""Guards: what overrides a policy. A guard can only ask for more computing, never for less."""

import math
from typing import Annotated

from pydantic import Field

from blockcache.plan.spec import Count, spec
from blockcache.plan.steps import Step

Length = Count | Annotated[float, Field(gt=0, lt=1)]
"""A number of steps, or a share of the run, rounded up."""


def _steps(length: int | float, total: int) -> int:
    # 0.14 * 50 is a little more than 7.
    return math.ceil(length * total - 1e-9) if isinstance(length, float) else length


class Guard:
    """Base class. A change of shape, stage or expert needs no guard: it always computes."""

    def must_compute(self, step: Step, streak: int) -> bool:
        """Whether `step` has to be computed after `streak` reused steps in a row."""
        raise NotImplementedError


@spec
class Warmup(Guard):
    """Compute the first `steps` steps, a number or a share of the run."""

    steps: Length = 3

    def must_compute(self, step: Step, streak: int) -> bool:
        """True in the first steps."""
        return step.index < _steps(self.steps, step.total)


@spec
class Cooldown(Guard):
    """Compute the last `steps` steps, a number or a share of the run."""

    steps: Length = 1

    def must_compute(self, step: Step, streak: int) -> bool:
        """True in the last steps."""
        return step.index >= step.total - _steps(self.steps, step.total)


@spec
class MaxStreak(Guard):
    """Reuse at most `steps` steps in a row."""

    steps: Annotated[Count, Field(ge=1)] = 4

    def must_compute(self, step: Step, streak: int) -> bool:
        """True after the longest allowed streak."""
        return streak >= self.steps


@spec
class Force(Guard):
    """Compute these steps; negative numbers count from the end."""

    steps: tuple[int, ...] = ()

    def must_compute(self, step: Step, streak: int) -> bool:
        """True for the listed steps."""
        return step.index in self.steps or step.index - step.total in self.steps
