"""The search on one budget: the screened candidates by real runs, then hill climbing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from blockcache.plan import Recipe
from blockcache.plan.paths import Path
from blockcache.tuning.scoring import Distance, Scorer, score
from blockcache.tuning.screening import Screen
from blockcache.tuning.shapes import Shape
from blockcache.tuning.stage import Item

_REACH = 3
"""How far a computed step is moved at once."""
_GAIN_DB = 0.05
_HOPELESS = 1.5
"""Moves whose screened cost is this many times the best mask's are not run."""
_AMPLIFICATION = 3.0


@dataclass(frozen=True)
class Found:
    """A mask and its runs.

    origin: how it was found. distances: per calibration item. shape: what it was run with.
    """

    origin: str
    computed: Path
    distances: tuple[Distance, ...]
    shape: Shape = Shape()

    @property
    def score(self) -> float:
        """What the search maximises."""
        return score(self.distances)


class Search:
    """Finds good masks by real runs.

    make: gives the recipe of a mask. shape: what masks are tried with now.
    """

    def __init__(
        self,
        screen: Screen,
        scorer: Scorer,
        items: Sequence[Item],
        make: Callable[[Path, Shape], Recipe],
        shape: Shape = Shape(),  # noqa: B008
    ) -> None:
        self.screen, self.scorer, self.items, self.make = screen, scorer, items, make
        self.shape = shape
        self.tried: dict[Path, Found] = {}

    def use(self, found: Found) -> None:
        """Go on with the shape of `found`; what was tried with another says nothing about it."""
        if found.shape != self.shape:
            self.shape, self.tried = found.shape, {found.computed: found}

    def best_of(self, masks: Sequence[tuple[str, Path]]) -> Found:
        """The best of some masks; all but the first may be given up half way."""
        best: Found | None = None
        for origin, computed in masks:
            best = self._better(origin, computed, best)
        if best is None:
            raise ValueError("no masks")
        return best

    def climb(self, start: Found, evaluations: int) -> Found:
        """First-improvement hill climbing, most promising moves first."""
        best, left = start, evaluations
        seen = {start.computed}
        while left > 0:
            for computed in self._moves(best.computed):
                if computed in seen:
                    continue
                seen.add(computed)
                left -= 1
                better = self._better("climbed", computed, best)
                if better is not best:
                    best = better
                    break
                if left <= 0:
                    break
            else:
                return best
        return best

    def _better(self, origin: str, computed: Path, best: Found | None) -> Found:
        known = self.tried.get(computed)
        if known is None:
            recipe = self.make(computed, self.shape)
            if best is None:
                distances: Sequence[Distance] | None = self.scorer.distance(recipe, self.items)
            else:
                distances = self.scorer.beats(recipe, self.items, best.distances)
            if distances is None and best is not None:
                return best
            known = Found(origin, computed, tuple(distances or ()), self.shape)
            self.tried[computed] = known
        return known if best is None or known.score > best.score + _GAIN_DB else best

    def _moves(self, computed: Path) -> Iterator[Path]:
        """Masks with one computed step moved, cheapest by the screen first."""
        total = self.screen.total
        moves = set()
        for at in computed[1:]:
            for by in range(-_REACH, _REACH + 1):
                to = at + by
                if 0 < to < total and to not in computed:
                    moves.add(tuple(sorted({*computed, to} - {at})))
        limit = _HOPELESS * self.screen.cost(computed, _AMPLIFICATION)
        costs = {move: self.screen.cost(move, _AMPLIFICATION) for move in moves}
        ranked = sorted(moves, key=lambda move: costs[move])
        return (move for move in ranked if costs[move] <= limit)

    def shorter(self, computed: Path) -> Path:
        """The mask without the step that the screen misses least."""
        options = [tuple(s for s in computed if s != at) for at in computed[1:]]
        return min(options, key=lambda mask: self.screen.cost(mask, _AMPLIFICATION))

    def longer(self, computed: Path) -> Path:
        """The mask with the one more step that the screen gains most by."""
        free = [s for s in range(1, self.screen.total) if s not in computed]
        options = [tuple(sorted({*computed, s})) for s in free]
        return min(options, key=lambda mask: self.screen.cost(mask, _AMPLIFICATION))
