"""Where a run stands: host-only coordinates of one sampler step."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One sampler step of a run.

    index: 0-based position in the run. total: steps of the run. sigma: the sampler's noise level
    or, where it has none, its timestep; only differences and order matter. stage, expert: change
    when the pipeline switches resolution stage or denoiser, and nothing is reused across that.
    """

    index: int
    total: int
    sigma: float
    stage: int = 0
    expert: str = ""


def steps_from_sigmas(sigmas: Sequence[float]) -> tuple[Step, ...]:
    """The steps of a run that visits `sigmas` in this order."""
    return tuple(Step(i, len(sigmas), float(s)) for i, s in enumerate(sigmas))


def even_steps(total: int) -> tuple[Step, ...]:
    """`total` steps evenly spaced from noise 1 towards 0, for when nothing else is known."""
    return steps_from_sigmas([1.0 - i / total for i in range(total)])
