"""What is asked of a plan, and when the answer may be believed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from blockcache.errors import BlockCacheError
from blockcache.tuning import quality
from blockcache.tuning.comparison import Picture

Measure: TypeAlias = Callable[[Picture, Picture], float]
"""Picture and uncached picture to a figure; the larger, the nearer."""

_LIMITS = {"psnr": (5.0, 90.0), "ssim": (0.0, 0.9999), "lpips": (0.0005, 1.0)}
OWN = "metric"
"""What a figure of the user's own is called."""
_AT_ONCE = 2 / 3
"""Of the error that is left, what one look may take."""
_LEAST_SPEEDUP, _MOST_SPEEDUP = 1.05, 50.0


@dataclass(frozen=True)
class Goal:
    """At least `target` of a figure in a share of the pictures, or a speed.

    name: of the figure, for `Plan.reached`. sign: -1 for figures that are better when smaller.
    measure: gives the figure times `sign`. speedup: asked for in the place of a figure; then the
    plan is the best there is at that speed, by PSNR. share: of new pictures that must reach it.
    """

    name: str
    target: float
    measure: Measure
    sign: float = 1.0
    speedup: float | None = None
    share: float = 0.5

    def figure(self, picture: Picture, reference: Picture) -> float:
        """The figure of one picture, larger is nearer."""
        return self.sign * float(self.measure(picture, reference))

    def reaches(self, figure: float) -> bool:
        """Whether one picture does."""
        return figure >= self.sign * self.target

    def typical(self, figures: Sequence[float]) -> float:
        """What `share` of the pictures reach."""
        return float(np.quantile(figures, 1 - self.share, method="lower"))

    def needed(self, count: int, confidence: float) -> int:
        """How many of `count` pictures, which had no part in the search, must reach it to convince.

        The one-sided Clopper-Pearson bound on the share of pictures that do: if no more than
        `share` of all pictures did, so many here would be less likely than 1 - `confidence`.
        count + 1 where not even all of them convince.
        """
        error = 1 - confidence + 1e-12
        return next(
            (k for k in range(count + 1) if chance(k, count, self.share) <= error), count + 1
        )

    def bars(self, count: int, confidence: float) -> Iterator[int]:
        """How many of `count` pictures must reach it, for one plan that is looked at after another.

        Each look takes a part of the error that is left; in all they take 1 - `confidence` at most.
        """
        error = 1 - confidence
        while True:
            bar = self.needed(count, 1 - _AT_ONCE * error)
            yield bar
            error -= chance(bar, count, self.share)

    def shortfall(self, figures: Sequence[float], bar: int) -> float:
        """By how much the figure that decides misses the target, negative if not at all."""
        ranked = sorted(figures, reverse=True)
        return self.sign * self.target - ranked[min(bar, len(figures)) - 1]

    def words(self) -> str:
        """The goal in a few words."""
        if self.speedup is not None:
            return f"{self.speedup:g}x"
        sense = "at least" if self.sign > 0 else "at most"
        unit = " dB" if self.name == "psnr_db" else ""
        return f"{self.name} {sense} {self.target:g}{unit} in {self.share:.0%} of the pictures"


def least_pictures(share: float, confidence: float) -> int:
    """How many pictures a check needs: all of them reaching the goal must be able to convince.

    For the second plan looked at, too, with what the first has left of the error.
    """
    error = _AT_ONCE * (1 - _AT_ONCE) * (1 - confidence)
    return math.ceil(math.log(error) / math.log(share) - 1e-9)


def chance(least: int, count: int, share: float) -> float:
    """Probability of at least `least` of `count` where each has probability `share`."""
    return sum(
        math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(least, count + 1)
    )


def goal_from(
    psnr: float | None,
    ssim: float | None,
    lpips: float | None,
    speedup: float | None,
    metric: tuple[Measure, float] | None,
    share: float,
) -> Goal:
    """The one goal that was given.

    Raises:
        BlockCacheError: none or several, or a target that cannot be.
    """
    given = {"psnr": psnr, "ssim": ssim, "lpips": lpips, "speedup": speedup, "metric": metric}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = ", ".join(named) or "none"
        raise BlockCacheError(f"give one goal of {', '.join(given)}; found {found}")
    if not 0 < share < 1:
        raise BlockCacheError(f"share must lie between 0 and 1, found {share}")
    if speedup is not None:
        _check(speedup, _LEAST_SPEEDUP, _MOST_SPEEDUP, "speedup", "1 is no gain")
        return Goal("psnr_db", -math.inf, quality.psnr, 1.0, float(speedup), share)
    if metric is not None:
        measure, target = metric
        if not math.isfinite(target):
            raise BlockCacheError(f"the metric's target must be a number, found {target}")
        return Goal(OWN, float(target), measure, share=share)
    if psnr is not None:
        _check(psnr, *_LIMITS["psnr"], "psnr", "in dB; only identical pictures are beyond")
        return Goal("psnr_db", float(psnr), quality.psnr, share=share)
    if ssim is not None:
        _check(ssim, *_LIMITS["ssim"], "ssim", "1 is identical")
        return Goal("ssim", float(ssim), quality.ssim_of_any, share=share)
    target = 0.0 if lpips is None else lpips
    _check(target, *_LIMITS["lpips"], "lpips", "0 is identical")
    return Goal("lpips", float(target), quality.lpips_measure(), -1.0, share=share)


def _check(value: float, low: float, high: float, name: str, why: str) -> None:
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise BlockCacheError(f"{name} must lie in {low:g}..{high:g} ({why}), found {value!r}")
