"""Online policies: decide step by step from what is measured in the run."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from blockcache.plan.policies.base import Policy
from blockcache.plan.spec import Count, spec
from blockcache.plan.steps import Step

Signal = Literal["first_block", "probe", "modulated", "filtered", "latent"]
Batch = Literal["any", "mean", "sample"]


@spec
class Gate(Policy):
    """Reuse while a signal changed little.

    threshold: relative L1 change, sum|a - b| / sum|b|, below which the site is reused. No unit,
    useful 0.03 to 0.2; 0 never reuses. Larger is faster and farther from the uncached picture.
    signal: what is compared. "first_block": the residual of the blocks in front of the site.
    "probe": the output of the blocks in front of it. "modulated": the first normed and
    time-modulated input of the site, or where a block modulates inside itself, its time embedding.
    "filtered": the same, of which only the frequencies that the noise level has resolved are kept.
    "latent": the change of the latents times the model's gain (output change per latent change at
    the last computed steps), relative to the output; for the site "model".
    reference: compared with the last "computed" step or the "previous" one.
    accumulate: add the changes up since the last computed step and compare the sum.
    rescale: coefficients of a polynomial of the change, highest power first, in its place.
    batch: compute if "any" sample asks, if the "mean" does, or decide for each "sample": then
    a sample's result does not depend on its neighbours; blocks run while one of them asks.
    falloff: of the spectrum that "filtered" assumes, |f|^-falloff; 2 for images, 3 for video.
    """

    threshold: Annotated[float, Field(ge=0, le=10)] = 0.08
    signal: Signal = "first_block"
    reference: Literal["computed", "previous"] = "computed"
    accumulate: bool = False
    rescale: tuple[float, ...] = ()
    batch: Batch = "any"
    falloff: Annotated[float, Field(ge=0, le=8)] = 2.0

    @property
    def needs_probe(self) -> bool:
        """Whether blocks in front of the site have to run before it decides."""
        return self.signal in ("first_block", "probe")

    def rescaled(self, change: float) -> float:
        """The polynomial of a change, or the change itself."""
        if not self.rescale:
            return change
        value = 0.0
        for coefficient in self.rescale:
            value = value * change + coefficient
        # A fitted polynomial may dip below zero outside its data; a change cannot.
        return max(value, 0.0) if value == value else value

    def should_compute(self, change: float, accumulated: float) -> bool:
        """Decide from this step's change and the sum of those since the last computed step.

        A change that is not a number (an all-zero reference) computes.
        """
        seen = accumulated + change if self.accumulate else change
        return not seen < self.threshold


@spec
class Ranked(Policy):
    """Compute everything every n-th step and in between only the units that turned the most.

    After a full step the units are ranked by the cosine similarity of their last two computed
    payloads (Sortblock, 2508.00412); the least similar `ratio` of them are computed on.
    n: interval of the full steps. ratio: share of the units, a polynomial of the timestep (0 to
    1000), highest power first, times `scale`. window: (start, stop) of `Step.time` inside which
    units are reused at all.
    """

    n: Annotated[Count, Field(ge=1)] = 5
    ratio: tuple[float, ...] = (1.0,)
    scale: Annotated[float, Field(ge=0)] = 0.1
    window: tuple[float, float] = (0.0, 1.0)

    def is_full(self, step: Step) -> bool:
        """Whether every unit is computed at `step`."""
        start, stop = self.window
        return not start <= step.noise_time <= stop or step.index % self.n == 0

    def chosen(self, step: Step, similarities: Sequence[float]) -> frozenset[int]:
        """The units to compute: the least similar, as many as the ratio says, rounded up."""
        share = 0.0
        for coefficient in self.ratio:
            share = share * (1000.0 * step.noise_time) + coefficient
        wanted = min(max(share * self.scale, 0.0), 1.0) * len(similarities)
        count = -int(-wanted // 1)
        order = sorted(range(len(similarities)), key=lambda i: similarities[i])
        return frozenset(order[:count])


@spec
class Codebook(Policy):
    """The change of one block's residual, looked up in a table, says how long to reuse.

    AdaCache (2411.02397). block: the block looked at, a share of the depth. table: pairs (change
    per step, steps until the next computed one), increasing changes; the last one is for all
    larger changes. The change is relative L1 between the last two computed steps, divided by their
    distance.
    """

    table: tuple[tuple[float, int], ...] = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2))
    block: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def __post_init__(self) -> None:
        """Refuse tables that are not increasing."""
        changes = [change for change, _ in self.table]
        if not changes or changes != sorted(changes) or min(n for _, n in self.table) < 1:
            raise ValueError("the table needs increasing changes and intervals of at least 1")

    def interval(self, change_per_step: float) -> int:
        """Steps from a computed step to the next one."""
        for limit, interval in self.table:
            if change_per_step < limit:
                return interval
        return 1


@spec
class Verified(Policy):
    """Reuse on trust, run the last block on the forecast, and compute the step if it disagrees.

    SpeCa (2509.11628). The site is every block but the last. threshold: relative error of the
    forecast of the last block's output that is still accepted early in the run; it falls to
    `threshold * decay` at the end, never below `floor`. least, most: steps between two
    computed ones.
    """

    threshold: Annotated[float, Field(gt=0, le=10)] = 0.1
    decay: Annotated[float, Field(gt=0, le=1)] = 0.01
    floor: Annotated[float, Field(ge=0, le=10)] = 0.01
    least: Annotated[Count, Field(ge=1)] = 2
    most: Annotated[Count, Field(ge=1)] = 5

    def limit(self, step: Step) -> float:
        """The error accepted at `step`."""
        return max(self.floor, self.threshold * float(self.decay**step.share))
