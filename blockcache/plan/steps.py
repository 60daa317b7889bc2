"""Where a run stands: host-only coordinates of one sampler step."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One sampler step of a run.

    index: 0-based position in the run. total: steps of the run. sigma: the sampler's noise level
    or, where it has none, its timestep; only differences and order matter. time: the timestep as a
    share of the longest one, 1 for pure noise down to 0; published windows are given in it (times
    1000). None where nobody knows it; steps then count as evenly spaced. stride: what an Euler
    sampler multiplies the model's output by, the change of the noise level; None for others.
    """

    index: int
    total: int
    sigma: float
    time: float | None = None
    stride: float | None = None

    @property
    def share(self) -> float:
        """Part of the run that is done when the step begins, 0 to 1."""
        return self.index / self.total

    @property
    def noise_time(self) -> float:
        """`time`, or what it would be with evenly spaced steps."""
        return 1.0 - self.share if self.time is None else self.time


def steps_from_sigmas(
    sigmas: Sequence[float],
    times: Sequence[float] | None = None,
    strides: Sequence[float] | None = None,
) -> tuple[Step, ...]:
    """The steps of a run that visits `sigmas` in this order; times and strides as in `Step`."""
    total = len(sigmas)
    unknown: Sequence[float | None] = [None] * total
    columns = zip(sigmas, times or unknown, strides or unknown, strict=True)
    return tuple(Step(i, total, float(s), t, d) for i, (s, t, d) in enumerate(columns))


def even_steps(total: int) -> tuple[Step, ...]:
    """`total` steps evenly spaced from noise 1 towards 0, for when nothing else is known."""
    return steps_from_sigmas([1.0 - i / total for i in range(total)])
