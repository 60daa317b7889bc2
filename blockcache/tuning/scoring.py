"""Scoring by real runs: how far a recipe's final latents are from the uncached ones.

Every candidate is run on the same prompts from the same noise, so two candidates differ by what
they compute and by nothing else. What was run once is not run again, in this process or, with a
file, in the next one.
"""

import hashlib
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockcache import api
from blockcache.errors import BlockCacheError
from blockcache.plan import Recipe
from blockcache.plan.spec import to_json
from blockcache.tuning.comparison import Picture
from blockcache.tuning.goal import OWN, Goal
from blockcache.tuning.stage import Item, Render, Stage, early_of, final_of

RUNS = "runs.jsonl"
"""In a tuning's folder: what was measured."""
_CAP_DB = 120.0
_CLEAR_DB = 0.5
"""A candidate this much behind over half of the prompts is not run on the others."""
_RECENT = 5
"""Uncached runs that say how long one takes now."""


class Exhausted(Exception):
    """The limit on runs or minutes is reached."""


@dataclass
class Ledger:
    """What the search has cost, and what it may.

    most_runs: limit in uncached runs. reserved: of these, what is kept for later. deadline: on
    `time.monotonic`. note: called after every run. runs: cost so far, in uncached runs.
    """

    most_runs: float = float("inf")
    reserved: float = 0.0
    deadline: float = float("inf")
    note: Callable[["Ledger"], None] = field(default=lambda ledger: None)
    runs: float = 0.0
    _uncached: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    @property
    def run_s(self) -> float:
        """Seconds of an uncached run, median of the last ones; 0 before the first."""
        return statistics.median(self._uncached) if self._uncached else 0.0

    def charge(self, seconds: float, is_uncached: bool = False) -> None:
        """Count a run; what was counted stays, should the machine's speed change."""
        if is_uncached:
            self._uncached.append(seconds)
        self.runs += 1.0 if is_uncached else seconds / self.run_s
        self.note(self)

    def learn(self, seconds: float) -> None:
        """Note the time of an uncached run that is counted elsewhere; needed before the first."""
        self._uncached.append(seconds)

    def check(self, more_runs: float = 0.0) -> None:
        """Stop if `more_runs` uncached runs would go beyond a limit.

        Raises:
            Exhausted: they would.
        """
        if self.runs + more_runs > self.most_runs - self.reserved:
            kept = f", {self.reserved:.0f} of them kept for later" if self.reserved >= 1 else ""
            raise Exhausted(f"the limit of {self.most_runs:.0f} runs is reached{kept}")
        if time.monotonic() > self.deadline:
            raise Exhausted("the time limit is reached")


class Distance(NamedTuple):
    """How far a run is from its uncached twin, in dB: -20 log10 of the relative L2 error.

    final: of the last latents. early: the lowest at a few early steps, NaN where the pipeline shows
    no latents; relative to the last latents' size, as the other.
    """

    final: float
    early: float


def score(distances: Sequence[Distance]) -> float:
    """The search's objective: the median of the final distances and the mean of the early ones.

    Why not the worst final ones? Prompts that stand between two pictures amplify whatever error
    they find early on, a hundredfold. Whether one of few calibration prompts tips is chance, and a
    search that follows it learns these prompts by heart; the error they amplify is there in every
    prompt, is hardly noisy, and tells the worst of *new* prompts better.
    """
    final = [d.final for d in distances]
    early = [d.early for d in distances if not math.isnan(d.early)]
    if not early:
        return 0.5 * float(np.median(final)) + 0.5 * float(np.mean(_worst_quarter(final)))
    return 0.5 * float(np.median(final)) + 0.5 * float(np.mean(early))


def _worst_quarter(values: Sequence[float]) -> list[float]:
    return sorted(values)[: max(1, round(len(values) / 4))]


class Memory:
    """What was measured, by recipe and item; with a file, across processes."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._known: dict[str, dict[str, Any]] = {}
        if file is not None and file.exists():
            for row in rows_of(file):
                self._known[row.pop("key")] = row
            if not file.read_bytes().endswith(b"\n"):
                with file.open("a") as end:
                    end.write("\n")

    def find(self, recipe: Recipe, item: Item, what: str) -> dict[str, Any] | None:
        """The figures of an earlier run."""
        return self._known.get(_key(recipe, item, what))

    def keep(self, recipe: Recipe, item: Item, what: str, row: dict[str, Any]) -> None:
        """Remember figures."""
        key = _key(recipe, item, what)
        self._known[key] = row
        # A figure of the user's own may be another one in the next process.
        if self._file is not None and what != OWN:
            about = {"key": key, "recipe": recipe.name, "mask": _mask(recipe), "item": item}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**about, "what": what, **row}) + "\n")


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """What was measured; a search that was killed while writing may leave half a line."""
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
            yield {**row, "key": str(row["key"])}
        except (ValueError, KeyError, TypeError):
            continue


def _mask(recipe: Recipe) -> str:
    """Tells recipes apart in the file."""
    text = json.dumps([to_json(recipe.rules), recipe.branches])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _key(recipe: Recipe, item: Item, what: str) -> str:
    text = json.dumps([to_json(recipe.rules), recipe.branches, list(item), what])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Scorer:
    """Runs recipes on items."""

    def __init__(self, stage: Stage, ledger: Ledger, memory: Memory) -> None:
        self.stage, self.ledger, self.memory = stage, ledger, memory
        self.references: dict[Item, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        """Uncached final and early latents."""
        self.pictures: dict[Item, Picture] = {}
        """Uncached pictures."""

    def distance(self, recipe: Recipe, items: Sequence[Item]) -> list[Distance]:
        """Distances from the uncached runs."""
        return [self._distance(recipe, item) for item in items]

    def beats(
        self, recipe: Recipe, items: Sequence[Item], best: Sequence[Distance], bonus: float = 0.0
    ) -> list[Distance] | None:
        """As `distance`, or None as soon as it is clear that it is no better than `best`.

        bonus: decibels by which it may be behind.
        """
        found: list[Distance] = []
        for count, item in enumerate(items, 1):
            found.append(self._distance(recipe, item))
            is_half = count == len(items) // 2 and count > 1
            if is_half and score(found) + bonus < score(best[:count]) - _CLEAR_DB:
                return None
        return found

    def _distance(self, recipe: Recipe, item: Item) -> Distance:
        known = self.memory.find(recipe, item, "latents")
        if known is None:
            self.ledger.check()
            with api.enabled(self.stage.pipe, recipe):
                found = self.stage.latents(item)
            self.ledger.charge(found.seconds)
            known = self._keep_distance(recipe, item, found)
        early = known["early_db"]
        return Distance(float(known["db"]), math.nan if early is None else float(early))

    def _keep_distance(self, recipe: Recipe, item: Item, found: Render) -> dict[str, Any]:
        final, early = self.references[item]
        size = _size(final)
        each = [
            decibels_of(ours, theirs, size)
            for ours, theirs in zip(early_of(found), early, strict=False)
        ]
        row = {
            "db": decibels_of(final_of(found), final, size),
            "early_db": min(each) if each else None,
            "seconds": found.seconds,
        }
        self.memory.keep(recipe, item, "latents", row)
        return row

    def figures(self, recipe: Recipe, items: Sequence[Item], goal: Goal) -> list[float]:
        """Per item the goal's figure of the decoded picture, larger is nearer."""
        return [self._figure(recipe, item, goal) for item in items]

    def reach(self, recipe: Recipe, items: Sequence[Item], goal: Goal, needed: int) -> bool:
        """Whether at least `needed` items reach the goal; no more runs than it takes to know."""
        reached = missed = 0
        for item in items:
            if goal.reaches(self._figure(recipe, item, goal)):
                reached += 1
            else:
                missed += 1
            if reached >= needed or missed > len(items) - needed:
                break
        return reached >= needed

    def _figure(self, recipe: Recipe, item: Item, goal: Goal) -> float:
        known = self.memory.find(recipe, item, goal.name)
        if known is None:
            reference = self.picture(item)
            self.ledger.check()
            with api.enabled(self.stage.pipe, recipe):
                found = self.stage.full(item)
            self.ledger.charge(found.seconds)
            if found.picture is None:
                raise RuntimeError("a render without a picture")
            known = {"figure": goal.figure(found.picture, reference), "seconds": found.seconds}
            self.memory.keep(recipe, item, goal.name, known)
            if item in self.references:
                self._keep_distance(recipe, item, found)
        return float(known["figure"])

    def picture(self, item: Item) -> Picture:
        """The uncached picture of an item."""
        if item not in self.pictures:
            self.ledger.check()
            found = self.stage.full(item)
            self.ledger.charge(found.seconds, is_uncached=True)
            if found.picture is None:
                raise RuntimeError("a render without a picture")
            self.pictures[item] = found.picture
            self.references.setdefault(item, (final_of(found), early_of(found)))
        return self.pictures[item]


def decibels_of(latents: NDArray[Any], reference: NDArray[Any], size: float) -> float:
    """-10 log10 of the mean squared error over `size`, between -120 and 120."""
    error = float(np.mean(np.square(latents.astype(np.float64) - reference)))
    if not np.isfinite(error):
        return -_CAP_DB
    return _CAP_DB if error == 0 else min(_CAP_DB, -10 * float(np.log10(error / size)))


def _size(reference: NDArray[Any]) -> float:
    """The mean square of uncached final latents.

    Raises:
        BlockCacheError: it is zero or not finite.
    """
    size = float(np.mean(np.square(reference, dtype=np.float64)))
    if not size > 0 or not np.isfinite(size):
        raise BlockCacheError(
            "the uncached run ends in latents that are all zero or not finite; check the pipeline"
        )
    return size
