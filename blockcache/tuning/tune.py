"""Ask for quality or speed, get the fastest plan that gives it.

1. Trace: every calibration prompt once, uncached.
2. Screen: from the Gram matrix of the model's output, the most promising masks of every budget.
3. Locate the budget by bisection with the user's own figure on the calibration prompts.
4. Score candidates there by real runs on the final latents, climb, and go to smaller budgets for as
   long as the goal is reached.
5. Check on prompts that had no part in any of this, from the fastest plan to slower ones, until one
   holds with the confidence asked for; the error is divided over the plans that are looked at. From
   one that holds it goes on to faster ones for as long as they hold, too.

The plan says what it reached there, what it cost to find, and which rival would have done as well.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blockcache import api
from blockcache.engine.runner import Runner
from blockcache.engine.tracker import strides_of
from blockcache.errors import BlockCacheError, PlanError
from blockcache.plan import Plan, Recipe
from blockcache.plan.paths import Path as Mask
from blockcache.tuning import quality
from blockcache.tuning.answer import Raced, asked_and_found, race, words_for, words_on_rivals
from blockcache.tuning.compare import Rivals, trial_of
from blockcache.tuning.goal import Goal, Measure, goal_from, least_pictures
from blockcache.tuning.scoring import RUNS, Exhausted, Ledger, Memory, Scorer
from blockcache.tuning.screening import Screen
from blockcache.tuning.search import Found, Search
from blockcache.tuning.shapes import AXES, Axis, Shape
from blockcache.tuning.stage import Item, Stage, items_of
from blockcache.tuning.trace import only_denoiser, trace_items

logger = logging.getLogger("blockcache")

Effort = Literal["full", "quick"]

CALIBRATION = 8
"""Prompts the search works on, at most; the others are for the check."""
_FEWEST_STEPS = 8
_LEAST_BUDGET = 3
_PASSES = {"full": 24.0, "quick": 7.5}
"""Of the 25 and 8 that are promised: the last runs are not given up at the limit."""
_CHECKED = {"full": 2.0, "quick": 1.5}
"""Pictures of the check for each one that was searched on."""
_RESERVED = {"full": 9.0, "quick": 3.5}
"""Of those, what the check, the timing and the rivals need."""
_FIRST_CLIMB = {"full": 24, "quick": 5}
_NEXT_CLIMB = {"full": 10, "quick": 2}
_LAST_CLIMB = 20
"""Before a budget is given up."""
_LAST = {"full": 4.0, "quick": 1.0}
"""Of the reserved, what the timing and the rivals need."""
_PER_CHECKED = 1.5
"""Runs for each picture of the check: the uncached one, and plans until one holds."""
_LEAST_PROMPTS = 4
"""Of fewer prompts a pass is cheap, and the search needs its runs all the same."""
_LEAST_SEARCH = 2.0
_LEAST_SLOWER = 2
"""Steps more after a check that failed, twice as many after the next: looks are few."""
_MOST_CHECKS = 5
_RIVAL_ITEMS = 8
_TIMED_RUNS = 3
_TIMED_PAIRS = 2
_SPEED_MARGIN = 1.02


@dataclass(frozen=True)
class Progress:
    """How far a tuning is.

    doing: one line. runs, most_runs: cost in uncached runs so far, and the limit. seconds_left: at
    most, as far as can be told.
    """

    doing: str
    runs: float
    most_runs: float
    seconds_left: float


def tune(
    pipe: Any,
    prompts: Sequence[str],
    *,
    psnr: float | None = None,
    ssim: float | None = None,
    lpips: float | None = None,
    speedup: float | None = None,
    metric: tuple[Measure, float] | None = None,
    share: float = 0.5,
    confidence: float = 0.9,
    effort: Effort = "full",
    seeds: Sequence[int] | None = None,
    work: str | Path | None = None,
    max_runs: float | None = None,
    minutes: float | None = None,
    rivals: Rivals | None = None,
    sub_layers: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **call_kwargs: Any,
) -> Plan:
    """The fastest plan whose pictures are near enough to the uncached ones.

    Ctrl-C returns the best plan so far. The pipeline is left disabled.

    Args:
        pipe: A pipeline with one denoiser.
        prompts: The kind of prompts the plan is for, 24 or more if possible: the first third (8 at
            most) is searched on, the others check. Of few prompts, the check uses other seeds.
        psnr: The goal in dB, against the uncached picture of the same seed; useful 28 to 45.
        ssim: Or the goal as structural similarity, useful 0.9 to 0.99.
        lpips: Or as LPIPS, which needs its weights on disk.
        speedup: In the place of a quality: the best plan at this speed.
        metric: A figure of your own: a function of (picture, uncached picture), larger is nearer,
            and what it has to reach.
        share: Of new pictures that have to reach the goal; 0.5 promises the median.
        confidence: One-sided, of that promise.
        effort: "full" costs at most 25 uncached passes over 8 prompts, "quick" 8.
        seeds: One per prompt; 0, 1, ... if None.
        work: Folder for trace and measurements; an interrupted tuning goes on from there.
        max_runs: Limit on the cost, in uncached runs.
        minutes: Limit on the time.
        rivals: Called with the chosen plan's findings, gives other ways to race against it, for
            example `blockcache.pipelines.samplers.rivals`.
        sub_layers: Try to reuse single attentions and MLPs, too. Keeps two outputs of each of them,
            where other plans keep two tensors of the model's width per branch.
        on_progress: Called after each run.
        call_kwargs: Passed to every pipeline call.

    Returns:
        A plan. `reached["met"]` is 1 if the goal holds, 0 if this is only the closest; `note` says
        it in words.

    Raises:
        BlockCacheError: no goal or several, a goal that cannot be, no prompts, too few steps.
        UnsupportedModelError: no denoiser, or two.
    """
    goal = goal_from(psnr, ssim, lpips, speedup, metric, share)
    if not 0.5 <= confidence < 1:
        raise BlockCacheError(f"confidence must lie between 0.5 and 1, found {confidence}")
    if effort not in _PASSES:
        raise BlockCacheError(f"effort must be one of {', '.join(_PASSES)}, found {effort!r}")
    stage = Stage(pipe, call_kwargs, "tune")
    if stage.steps < _FEWEST_STEPS:
        raise BlockCacheError(
            f"a run of {stage.steps} steps leaves nothing to tune (at least {_FEWEST_STEPS})"
        )
    only_denoiser(pipe)
    least = least_pictures(share, confidence)
    calibration, check = split(items_of(prompts, seeds), least, _CHECKED[effort])
    check_is_possible(effort, len(calibration), len(check), share, confidence)
    tuner = _Tuner(stage, goal, confidence, effort, calibration, check, sub_layers, on_progress)
    tuner.limit(max_runs, minutes)
    return tuner.run(None if work is None else Path(work), rivals)


@contextmanager
def without_remarks() -> Iterator[None]:
    """What a trial that may be given up has to remark on is no concern of the user's."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_all_dense(pipe: Any) -> bool:
    """Whether the last run was asked to thin out attention and never did."""
    runs = [attached.engine for attached in api.attachments(pipe).values()]
    asked = [r.last_run.attention for r in runs if isinstance(r, Runner) and r.last_run]
    return any(stats is not None and not stats.sparse_calls for stats in asked)


def split(
    items: Sequence[Item], least: int, per_calibration: float = 2.0
) -> tuple[list[Item], list[Item]]:
    """Calibration items, and `per_calibration` times as many, or `least`, for the check.

    No picture is used twice. Where there are too few prompts for that, the check repeats prompts
    with other seeds.
    """
    count = min(CALIBRATION, max(1, (len(items) + 1) // 3))
    calibration, rest = list(items[:count]), list(dict.fromkeys(items[count:]))
    repeated = {p for p, _ in rest} & {p for p, _ in calibration}
    if repeated:
        logger.warning(
            "%d prompts are in the calibration and in the check, too: the promise is for these "
            "prompts with other seeds, not for other prompts",
            len(repeated),
        )
    if not rest:
        logger.warning("one prompt only: the promise is for this prompt with other seeds")
        rest = calibration
    free = max(seed for _, seed in items) + 1
    wanted = max(round(per_calibration * count), least)
    check = [item for item in rest if item not in calibration][:wanted]
    while len(check) < wanted:
        check.append((rest[len(check) % len(rest)][0], free))
        free += 1
    prompts = {prompt for prompt, _ in check}
    if len(prompts) < len(check) and not repeated and rest is not calibration:
        logger.warning(
            "%d pictures are checked with %d prompts: give more prompts for a promise that goes "
            "further than these",
            len(check),
            len(prompts),
        )
    return calibration, check


def check_is_possible(
    effort: Effort, calibrated: int, checked: int, share: float, confidence: float
) -> None:
    """Refuse what cannot be answered within the cost promised.

    Raises:
        BlockCacheError: the check needs so many pictures that nothing is left to search with.
    """
    prompts = max(calibrated, _LEAST_PROMPTS)
    most = _PASSES[effort] * prompts
    if reserved_runs(effort, prompts, checked) > most - _LEAST_SEARCH * prompts:
        raise BlockCacheError(
            f"a share of {share:g} at confidence {confidence:g} needs {checked} pictures to check, "
            f"too many for the {most:.0f} runs that effort {effort!r} is for; lower one of the two"
            + (", or give effort 'full'" if effort == "quick" else "")
        )


def reserved_runs(effort: Effort, prompts: int, checked: int) -> float:
    """Uncached runs that are kept for check, timing and rivals."""
    return max(_RESERVED[effort] * prompts, _PER_CHECKED * checked + _LAST[effort] * prompts)


@dataclass
class _Best:
    """The answer so far."""

    found: Found | None = None
    figures: list[float] = field(default_factory=list)
    """On the check items."""
    is_met: bool = False
    why: str = "nothing was found yet"


class _Tuner:
    def __init__(
        self,
        stage: Stage,
        goal: Goal,
        confidence: float,
        effort: Effort,
        calibration: list[Item],
        check: list[Item],
        sub_layers: bool,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.stage, self.goal, self.confidence, self.effort = stage, goal, confidence, effort
        self.calibration, self.check = calibration, check
        self.doing = "tracing"
        self.best = _Best()
        self.floor_db = quality.CAP_DB
        self.sub_layers = sub_layers
        self._pairs: dict[Recipe, list[tuple[float, float]]] = {}
        self._report = on_progress
        self._started = time.monotonic()
        self.ledger = Ledger(note=self._progress)
        self._prompts = max(len(calibration), _LEAST_PROMPTS)
        self._reserved = reserved_runs(effort, self._prompts, len(check))

    def limit(self, max_runs: float | None, minutes: float | None) -> None:
        """Set the limits."""
        most = _PASSES[self.effort] * self._prompts
        self.ledger.most_runs = most if max_runs is None else min(most, max_runs)
        if minutes is not None:
            self.ledger.deadline = self._started + 60 * minutes

    def _progress(self, ledger: Ledger) -> None:
        if self._report is None:
            return
        most = ledger.most_runs
        left = max(0.0, (most - ledger.runs) * ledger.run_s)
        self._report(Progress(self.doing, ledger.runs, most, left))

    def run(self, work: Path | None, rivals: Rivals | None) -> Plan:
        """All of it."""
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
        try:
            self._prepare(work)
            self._search_and_check()
        except KeyboardInterrupt:
            if self.best.found is None:
                raise
            doubt = f"{self.best.why}; " if self.best.figures else ""
            self.best.why = f"{doubt}interrupted before it could be checked"
        except Exhausted as limit:
            if self.best.found is None:
                raise BlockCacheError(f"{limit} before anything was found; allow more") from None
            doubt = self.best.why if self.best.figures else "not checked"
            self.best.why = f"{doubt}: {limit}"
        finally:
            api.disable(self.stage.pipe)
        return self._plan(rivals)

    # ---- trace and screen ----------------------------------------------------------------------

    def _prepare(self, work: Path | None) -> None:
        memory = Memory(None if work is None else work / RUNS)
        self.scorer = Scorer(self.stage, self.ledger, memory)
        started = time.perf_counter()
        self.trace = trace_items(
            self.stage,
            self.calibration,
            None if work is None else work / "trace",
            ("model",),
            on_picture=self.scorer.pictures.__setitem__,
        )
        self.ledger.learn(self.trace.milliseconds["run"] / 1e3)
        self.ledger.charge(time.perf_counter() - started)
        for item, *latents in zip(
            self.calibration, self.trace.latents, self.trace.early, strict=True
        ):
            self.scorer.references[item] = (latents[0], latents[1])
        self._measure_floor()
        shape = Shape.first(strides_of(self.stage.pipe.scheduler) is not None)
        self.screen = Screen(self.trace)
        self.search = Search(self.screen, self.scorer, self.calibration, self._recipe, shape)

    def _measure_floor(self) -> None:
        """A pipeline that does not repeat itself cannot promise more than it keeps."""
        item = self.calibration[0]
        first = self.scorer.picture(item)
        again = self.stage.render(item)
        self.ledger.charge(again.seconds, is_uncached=True)
        if again.picture is None:
            raise RuntimeError("a render without a picture")
        self.floor_db = quality.psnr(again.picture, first)
        if self.floor_db >= quality.CAP_DB:
            return
        floor = self.goal.figure(again.picture, first)
        if self.goal.speedup is None and not self.goal.reaches(floor):
            raise BlockCacheError(
                f"two uncached runs of one seed are {self.floor_db:.1f} dB apart here, so no plan "
                f"can promise {self.goal.words()}; make the pipeline deterministic"
            )
        logger.warning("two uncached runs of one seed are %.1f dB apart", self.floor_db)

    def _recipe(self, computed: Mask, shape: Shape) -> Recipe:
        return shape.recipe(computed, self.trace.sigmas)

    def _recipe_of(self, found: Found) -> Recipe:
        return self._recipe(found.computed, found.shape)

    # ---- search --------------------------------------------------------------------------------

    def _search_and_check(self) -> None:
        self.ledger.reserved = min(self._reserved, self.ledger.most_runs / 2)
        ladder: list[Found] = []
        try:
            ladder = self._ladder() if self.goal.speedup is None else [self._fastest()]
        except Exhausted:
            if self.best.found is None:
                raise
            ladder = [self.best.found]
        self.ledger.reserved = 0.0
        self._check(ladder)

    def _ladder(self) -> list[Found]:
        """Plans that reach the goal on the calibration items, the fastest first."""
        budget = self._locate()
        found = self._refine(budget, (), _FIRST_CLIMB[self.effort])
        found = self._choose_shape(found, AXES[self.effort])
        ladder: list[Found] = []
        while self._reaches(found):
            ladder.insert(0, found)
            self.best.found = found
            if len(found.computed) <= _LEAST_BUDGET:
                return ladder
            shorter = self.search.shorter(found.computed)
            found = self._refine(len(shorter), (("shortened", shorter),), _NEXT_CLIMB[self.effort])
            if not self._reaches(found) and self.effort == "full":
                # What suited the longer mask need not suit this one.
                found = self._choose_shape(found, ("forecast",))
                found = self.search.climb(found, _LAST_CLIMB)
        while not ladder:
            if len(found.computed) >= self.screen.total - 1:
                return [found]
            longer = self.search.longer(found.computed)
            found = self._refine(len(longer), (("lengthened", longer),), _NEXT_CLIMB[self.effort])
            if self._reaches(found):
                ladder.append(found)
        return ladder

    def _locate(self) -> int:
        """The least budget at which the screen's own mask reaches the goal."""
        self.doing = "locating the budget"
        low, high = _LEAST_BUDGET, self.screen.total - 1
        while low < high:
            # Nearer the fast end: plans there are the likely ones, and cheaper to try.
            middle = low + max(1, (high - low) // 3) - (1 if high - low == 1 else 0)
            tried = Found(*self._screened(middle), (), self.search.shape)
            if self._reaches(tried):
                high = middle
            else:
                low = middle + 1
            if high == middle or high == self.screen.total - 1:
                # The fastest that reaches it, or as long as there is none, the nearest.
                self.best.found = tried
        return low

    def _screened(self, budget: int) -> tuple[str, Mask]:
        masks = [(c.origin, c.computed) for c in self.screen.candidates(budget)]
        return masks[1 if len(masks) > 2 else 0]

    def _reaches(self, found: Found) -> bool:
        """Whether the check may be expected to convince: it asks for more than `share` of them."""
        count, searched = len(self.check), len(self.calibration)
        asked = next(self.goal.bars(count, self.confidence)) / count
        misses = int(max(0.0, 1 - asked) * searched + 1e-9)
        recipe = self._recipe_of(found)
        return self.scorer.reach(recipe, self.calibration, self.goal, searched - misses)

    def _refine(self, budget: int, more: Sequence[tuple[str, Mask]], climb: int) -> Found:
        self.doing = f"searching {budget} of {self.screen.total} steps"
        masks = [(c.origin, c.computed) for c in self.screen.candidates(budget)]
        found = self.search.best_of([*more, *masks])
        if self.best.found is None:
            self.best.found = found
        return self.search.climb(found, climb)

    def _choose_shape(self, found: Found, axes: Sequence[Axis]) -> Found:
        """The best way to reuse, one axis after the other, all in the time of the mask found."""
        branches = len(self.trace.branches)
        for axis in axes:
            self.doing = f"choosing the {axis}"
            best = found
            for shape in found.shape.variants(axis, branches, self.sub_layers):
                tried = self._in_the_same_time(found, shape, best)
                if tried is not None and tried.score > best.score:
                    best = tried
            found = best
            self.search.use(found)
        return found

    def _in_the_same_time(self, found: Found, shape: Shape, best: Found) -> Found | None:
        """`shape` with as many steps as take the time of `found`; None where `best` is better."""
        slower = self._slower_by(found, shape)
        if slower is None:
            return None
        ms, total = self.trace.milliseconds, self.screen.total
        # What a step more costs; on tiny models reuse may seem to cost as much as computing.
        step_ms = max(ms["computed"] - ms["reused"], 0.1 * ms["computed"], 1e-3)
        more = round(-1e3 * slower / step_ms)
        wanted = min(max(len(found.computed) + more, _LEAST_BUDGET), total - 1)
        computed = found.computed
        while len(computed) != wanted:
            is_short = len(computed) < wanted
            computed = (self.search.longer if is_short else self.search.shorter)(computed)
        recipe = self._recipe(computed, shape)
        distances = self.scorer.beats(recipe, self.calibration, best.distances)
        return None if distances is None else Found(found.origin, computed, tuple(distances), shape)

    def _slower_by(self, found: Found, shape: Shape) -> float | None:
        """Seconds that a run takes longer with `shape`; None where it does nothing here."""
        if shape.takes_as_long_as(found.shape):
            return 0.0
        item, theirs = self.calibration[0], self._recipe(found.computed, shape)
        what = f"against {found.shape.name}"
        known = self.scorer.memory.find(theirs, item, what)
        if known is None:
            known = {"slower_s": self._timed_against(self._recipe_of(found), theirs, item)}
            # Kept, so that a search that is resumed decides as it did.
            self.scorer.memory.keep(theirs, item, what, known)
        seconds: float | None = known["slower_s"]
        return seconds

    def _timed_against(self, ours: Recipe, theirs: Recipe, item: Item) -> float | None:
        seconds: dict[Recipe, list[float]] = {ours: [], theirs: []}
        for recipe in _TIMED_PAIRS * (ours, theirs):
            try:
                with without_remarks(), api.enabled(self.stage.pipe, recipe):
                    seconds[recipe].append(self.stage.latents(item).seconds)
                    is_idle = is_all_dense(self.stage.pipe)
            except PlanError:
                # A model without such sites.
                return None
            self.ledger.charge(seconds[recipe][-1])
            if is_idle:
                return None
        return min(seconds[theirs]) - min(seconds[ours])

    def _fastest(self) -> Found:
        """The best plan at the speed asked for."""
        wanted = float(self.goal.speedup or 1.0)
        budget = self._budget_for(wanted)
        found = self._refine(budget, (), _FIRST_CLIMB[self.effort])
        found = self._choose_shape(found, AXES[self.effort])
        self.best.found = found
        speed = self._speed(found)
        slowed = self._slowed_to(wanted, found, speed)
        if slowed is not found:
            self.best.found = found = slowed
            speed = self._speed(found)
        # A little more than is asked for: the answer is timed once more.
        while speed < wanted * _SPEED_MARGIN and len(found.computed) > _LEAST_BUDGET:
            # A step less, or as many as it takes.
            over = len(found.computed) * (1 - speed / wanted)
            computed = found.computed
            for _ in range(max(1, int(over))):
                computed = self.search.shorter(computed)
            climb = _NEXT_CLIMB[self.effort]
            found = self._refine(len(computed), (("shortened", computed),), climb)
            self.best.found = found
            speed = self._speed(found)
        return found

    def _slowed_to(self, wanted: float, found: Found, speed: float) -> Found:
        """More steps, where the run is faster than the trace's milliseconds let expect."""
        spare = speed / (wanted * _SPEED_MARGIN) - 1
        more = min(int(len(found.computed) * spare), self.screen.total - 1 - len(found.computed))
        if more < 1:
            return found
        computed = found.computed
        for _ in range(more):
            computed = self.search.longer(computed)
        climb = _NEXT_CLIMB[self.effort]
        return self._refine(len(computed), (("lengthened", computed),), climb)

    def _budget_for(self, speedup: float) -> int:
        ms, total = self.trace.milliseconds, self.screen.total
        free = ms["run"] / (speedup * _SPEED_MARGIN) - ms["fixed"] - total * ms["reused"]
        budget = int(free / max(1e-9, ms["computed"] - ms["reused"]))
        if budget < _LEAST_BUDGET:
            most = ms["run"] / (ms["fixed"] + total * ms["reused"] + 3 * ms["computed"])
            raise BlockCacheError(
                f"{speedup:g}x cannot be reached by reusing steps here: the parts that always run "
                f"allow {most:.1f}x at most"
            )
        return min(total - 1, budget)

    def _speed(self, found: Found) -> float:
        """Times as fast as uncached, measured in turns on the whole call, with earlier turns."""
        item, recipe = self.calibration[0], self._recipe_of(found)
        pairs = self._pairs.setdefault(recipe, [])
        for _ in range(_TIMED_RUNS):
            plain = self.stage.render(item).seconds
            with api.enabled(self.stage.pipe, recipe):
                cached = self.stage.render(item).seconds
            self.ledger.charge(plain, is_uncached=True)
            self.ledger.charge(cached)
            pairs.append((plain, cached))
        self._seconds = statistics.median(cached for _, cached in pairs)
        return statistics.median(plain / cached for plain, cached in pairs)

    # ---- check ---------------------------------------------------------------------------------

    def _check(self, ladder: Sequence[Found]) -> None:
        self.doing = "checking on other prompts"
        waiting, least, added = list(ladder), _LEAST_SLOWER, 0
        bars = self.goal.bars(len(self.check), self.confidence)
        for attempt, bar in zip(range(_MOST_CHECKS), bars, strict=False):
            found = waiting.pop(0)
            figures = self.scorer.figures(self._recipe_of(found), self.check, self.goal)
            self.best = _Best(found, figures)
            if self.goal.speedup is not None:
                self.best.is_met = True
                return
            if sum(map(self.goal.reaches, figures)) >= bar:
                self.best.is_met = True
                self._hasten(found, bar, added)
                return
            self.best.why = "the goal does not hold on other prompts"
            if attempt + 1 < _MOST_CHECKS and not waiting:
                is_in_db = self.goal.name == "psnr_db"
                short = self.goal.shortfall(figures, bar) if is_in_db else 0.0
                waiting.append(self._slower(found, max(least, round(short / 2))))
                added = len(waiting[0].computed) - len(found.computed)
                least *= 2

    def _slower(self, found: Found, more: int) -> Found:
        """The next plan to check, with `more` steps if there are as many."""
        self.search.use(found)
        computed = found.computed
        for _ in range(min(more, self.screen.total - 1 - len(computed))):
            computed = self.search.longer(computed)
        # As it is, for looks are few and must not be spent on a search; `_hasten` comes after.
        return Found("lengthened", computed, (), found.shape)

    def _hasten(self, found: Found, bar: int, added: int) -> None:
        """Fewer steps, for as long as that holds, too; half of the last `added`, and half of that.

        Nothing is risked by going on from what holds: tests in a fixed order, the next only after a
        success, have together the error of one (Maurer, Hothorn and Lehmacher, 1995).
        """
        self.ledger.reserved = min(_LAST[self.effort] * self._prompts, self.ledger.most_runs / 4)
        try:
            while len(found.computed) > _LEAST_BUDGET:
                self.search.use(found)
                added = max(1, added // 2)
                shorter = found.computed
                for _ in range(min(added, len(shorter) - _LEAST_BUDGET)):
                    shorter = self.search.shorter(shorter)
                if self.effort == "quick" or added > 1:
                    found = Found("shortened", shorter, (), found.shape)
                else:
                    masks = (("shortened", shorter),)
                    found = self._refine(len(shorter), masks, _NEXT_CLIMB[self.effort])
                recipe = self._recipe_of(found)
                if not self.scorer.reach(recipe, self.check, self.goal, bar):
                    return
                figures = self.scorer.figures(recipe, self.check, self.goal)
                self.best = _Best(found, figures, is_met=True)
        except Exhausted:
            return
        finally:
            self.ledger.reserved = 0.0

    # ---- the answer ----------------------------------------------------------------------------

    def _plan(self, rivals: Rivals | None) -> Plan:
        found = self.best.found
        if found is None:
            raise RuntimeError("no plan")
        recipe = self._recipe_of(found)
        speed, words = float("nan"), []
        try:
            self.doing = "timing"
            speed = self._speed(found)
            if self.goal.speedup is not None and speed < self.goal.speedup:
                self.best.is_met, self.best.why = False, f"measured {speed:.2f}x"
            if rivals is not None and self.best.figures and self.effort == "full":
                words = self._race(rivals, recipe)
        except Exhausted as limit:
            words = [f"the rivals were not raced: {limit}"]
        except KeyboardInterrupt:
            pass
        figures = {
            "met": float(self.best.is_met),
            "confidence": self.confidence,
            **asked_and_found(self.goal, self.best.figures),
            **({"speedup": speed} if math.isfinite(speed) else {}),
            "calibrated": float(len(self.calibration)),
            "determinism_floor_db": self.floor_db,
            "passes": self.ledger.runs / self._prompts,
            "minutes": (time.monotonic() - self._started) / 60,
        }
        how = (
            f"{len(found.computed)} of {self.screen.total} steps computed; reused: "
            f"{found.shape.name}; mask {found.origin}"
        )
        why = "" if self.best.is_met else self.best.why
        note = "\n".join([*words_for(self.goal, figures, how, why), *words])
        if why:
            logger.warning("%s", note.splitlines()[0])
        return Plan(recipe, self.trace.fingerprint, self.screen.total, figures, note)

    def _race(self, rivals: Rivals, recipe: Recipe) -> list[str]:
        """What other ways give in the same time, on the first items of the check."""
        self.doing = "racing the rivals"
        items = self.check[:_RIVAL_ITEMS]
        started = time.perf_counter()
        trial = trial_of(self.stage, recipe, items[0])
        arms = [arm for arm in rivals(trial) if not arm.objection]
        self.ledger.charge(time.perf_counter() - started)
        # All of them, or none: each takes about as long as the plan.
        self.ledger.check(len(arms) * len(items) * self._seconds / self.ledger.run_s)
        ours = Raced("this plan", 0, tuple(self.best.figures[: len(items)]), self._seconds)
        raced = [race(self.stage, self.scorer, self.goal, arm, items) for arm in arms]
        return words_on_rivals(self.goal, ours, raced, _SPEED_MARGIN)
