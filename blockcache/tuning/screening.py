"""Screening: every budget's most promising masks, from Gram matrices alone.

What a reused step does wrong moves the latents by its stride, the fall of the noise level, times
y_t - sum_j w_j y_tj, with y the model's output. Errors of neighbouring steps point the same way, so
what counts is the sum over a whole segment between two computed steps, not the size of each; its
square is a quadratic form in the Gram matrix of the uncached run. With the last two computed steps
as the state, the masks with the least sum are found exactly, for every budget.

What such teacher-forced numbers cannot see is that the sampler amplifies an early error: most
prompts forget it, a few, which stand between two pictures, blow it up a hundredfold. An early error
therefore counts for more, by a factor that falls from `amplification` at the first step to 1 at the
last. Which factor is right is for real runs to say; each gives a candidate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from blockcache.errors import PlanError
from blockcache.plan import Predictor, Step, Taylor
from blockcache.plan.paths import Floats, Path, cheapest_forecast
from blockcache.plan.policies.static import bathtub_steps, geometric_steps
from blockcache.plan.trace import Trace

AMPLIFICATIONS = (1.0, 3.0, 10.0)
_MOST_STEPS = 200


@dataclass(frozen=True)
class Candidate:
    """A mask worth trying. origin: where it comes from. computed: the computed steps."""

    origin: str
    computed: Path


class Screen:
    """Costs of segments, and the masks that follow from them."""

    def __init__(self, trace: Trace, predictor: Predictor | None = None) -> None:
        """Works on the Gram matrices of the model's output, the branches' costs added up.

        predictor: one that looks back on two computed steps at most; `Taylor(1)` by default.

        Raises:
            PlanError: a longer look back, or a run too long for the dynamic program.
        """
        self._steps = trace.steps
        self.total = len(self._steps)
        self._predictor = predictor or Taylor(1)
        if self._predictor.depth > 2:
            raise PlanError("screening is exact for predictors of two anchors at most")
        if len(self._steps) > _MOST_STEPS:
            raise PlanError(f"screening is for {_MOST_STEPS} steps at most")
        self._strides = strides(self._steps)
        parts = [self._segments(_normalised(trace, branch)) for branch in trace.branches]
        self._plain: Floats = np.sum(parts, axis=0)

    def costs(self, amplification: float) -> Floats:
        """Costs of segments, `[T, T, T + 1]`, as `plan.paths.cheapest_forecast` takes them.

        Entry (h, i, j) is for the segment between computed steps i and j when h was computed before
        i; (0, 0, j) for the first segment.
        """
        factor = amplification ** (1 - np.arange(self.total) / self.total)
        return np.asarray(self._plain * factor[None, :, None] ** 2)

    def cost(self, computed: Sequence[int], amplification: float = 1.0) -> float:
        """What a mask costs."""
        factor = amplification ** (1 - np.asarray(computed) / self.total)
        before, ends = [computed[0], *computed[:-1]], [*computed[1:], self.total]
        return float((self._plain[before, list(computed), ends] * factor**2).sum())

    def candidates(self, budget: int) -> Iterator[Candidate]:
        """Different masks that compute `budget` steps, the uncalibrated ones among them."""
        seen: set[Path] = set()
        for amplification in AMPLIFICATIONS:
            path = cheapest_forecast(self.costs(amplification), budget)
            if path not in seen:
                seen.add(path)
                yield Candidate(f"screened {amplification:g}", path)
        for make in (bathtub_steps, geometric_steps):
            path = make(budget, self.total)
            if path not in seen:
                seen.add(path)
                yield Candidate(make.__name__.removesuffix("_steps"), path)

    def _segments(self, gram: Floats) -> Floats:
        total = self.total
        costs = np.full((total, total, total + 1), np.inf)
        for i in range(total):
            for h in range(i) if i else (0,):
                costs[h, i, i + 1 :] = self._from(gram, (i,) if i == h else (i, h))
        return costs

    def _from(self, gram: Floats, anchors: tuple[int, ...]) -> Floats:
        """Costs of the segments that begin at `anchors[0]`, by growing length."""
        total, start = self.total, anchors[0]
        moved = np.zeros((total - start, total))
        places = [self._steps[a] for a in anchors]
        for row in range(1, total - start):
            t = start + row
            moved[row] = moved[row - 1]
            moved[row, t] += self._strides[t]
            for a, w in zip(anchors, self._predictor.weights(self._steps[t], places), strict=False):
                moved[row, a] -= self._strides[t] * w
        return np.asarray(np.maximum(np.einsum("rt,rt->r", moved @ gram, moved), 0.0))


def strides(steps: Sequence[Step]) -> Floats:
    """How far the sampler goes in each step: the fall of the noise level, in all 1.

    Where the levels do not fall steadily (timesteps of unknown meaning) all steps count alike.
    """
    levels = np.array([step.sigma for step in steps])
    falls = -np.diff(levels, append=0.0)
    if not (falls > 0).all():
        falls = np.ones(len(levels))
    return np.asarray(falls / falls.sum())


def _normalised(trace: Trace, branch: str) -> Floats:
    """The mean Gram matrix of the model's output, every prompt at size 1."""
    gram = trace.at("model", 0, "output", branch).gram
    sizes = np.einsum("ptt->p", gram) / gram.shape[1]
    return np.asarray((gram / sizes[:, None, None]).mean(0))
