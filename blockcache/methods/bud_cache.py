"""BudCache (2606.13496): simulated annealing, then steepest descent, over masks of fixed size.

Every candidate is judged by a real run: the squared error of the final latents against the uncached
run. Kept: objective, forced first steps, proposals (one computed step moved, seven times of ten by
at most three; one time of ten two at once), geometric cooling, descent with a window of three and
two random jumps per step, memory of what was tried. Different: any number of prompts, as the score
is the caller's; the second stage, learning noise levels for the mask, is left out.
State: one stack residual per branch.
"""

import math
import random
from collections.abc import Callable, Iterator

from blockcache.errors import PlanError
from blockcache.plan import MaskTable, Recipe, Rule, Site
from blockcache.plan.policies.static import geometric_steps, steps_of

Mask = tuple[int, ...]

_HOT, _COLD = 0.05, 1e-5
_WINDOW, _JUMPS = 3, 2


def bud_cache(
    score: Callable[[Recipe], float],
    steps: int = 50,
    budget: float = 0.3,
    proposals: int = 200,
    rounds: int = 20,
    seed: int = 0,
) -> Recipe:
    """The mask of `budget` of the steps whose real runs end nearest to the uncached one.

    score: runs a recipe and gives its error, smaller is better; see
    `blockcache.tuning.runs.latent_error`. steps: of the run. budget: share of them
    computed. proposals: annealing steps.
    rounds: of steepest descent at most; each tries every neighbour. seed: of the random numbers.

    Raises:
        PlanError: impossible settings.
    """
    count = steps_of(budget, steps)
    if count < 2 or proposals < 0 or rounds < 0:
        raise PlanError("bud_cache needs two computed steps and no negative numbers of tries")
    search = _Search(score, steps, max(1, count // 4), random.Random(seed))
    best = search.annealed(geometric_steps(count, steps), proposals)
    return search.recipe(search.descended(best, rounds))


class _Search:
    """forced: how many first steps are computed in any case."""

    def __init__(
        self, score: Callable[[Recipe], float], steps: int, forced: int, chance: random.Random
    ) -> None:
        self._score, self._steps, self._forced, self._chance = score, steps, forced, chance
        self._known: dict[Mask, float] = {}

    def recipe(self, mask: Mask) -> Recipe:
        table = MaskTable((mask,), self._steps)
        return Recipe((Rule(Site("stack"), table),), name=f"bud_cache {len(mask)}")

    def error(self, mask: Mask) -> float:
        if mask not in self._known:
            self._known[mask] = self._score(self.recipe(mask))
        return self._known[mask]

    def annealed(self, start: Mask, proposals: int) -> Mask:
        here = best = tuple(sorted({*range(self._forced), *start[self._forced :]}))
        for i in range(proposals):
            heat = _HOT * (_COLD / _HOT) ** (i / max(proposals - 1, 1))
            there = self._moved(here)
            if self._chance.random() < 0.1:
                there = self._moved(there)
            worse = self.error(there) - self.error(here)
            # Relative to the error at hand: the temperatures are of a normalised one.
            if worse <= 0 or self._chance.random() < math.exp(-worse / (heat * self.error(here))):
                here = there
            if self.error(here) < self.error(best):
                best = here
        return best

    def descended(self, mask: Mask, rounds: int) -> Mask:
        for _ in range(rounds):
            best = min(self._neighbours(mask), key=self.error, default=mask)
            if self.error(best) >= self.error(mask):
                return mask
            mask = best
        return mask

    def _moved(self, mask: Mask) -> Mask:
        """One computed step somewhere else, mostly near."""
        movable = [step for step in mask if step >= self._forced]
        free = [step for step in range(self._forced, self._steps) if step not in mask]
        if not movable or not free:
            return mask
        gone = self._chance.choice(movable)
        near = [step for step in free if abs(step - gone) <= _WINDOW]
        is_near = near and self._chance.random() < 0.7
        return tuple(sorted({*mask, self._chance.choice(near if is_near else free)} - {gone}))

    def _neighbours(self, mask: Mask) -> Iterator[Mask]:
        free = [step for step in range(self._forced, self._steps) if step not in mask]
        for gone in (step for step in mask if step >= self._forced):
            near = [step for step in free if abs(step - gone) <= _WINDOW]
            jumps = self._chance.sample(free, min(_JUMPS, len(free)))
            for step in {*near, *jumps}:
                yield tuple(sorted({*mask, step} - {gone}))
