"""The same seeds with and without the cache: seconds, decibels and the pictures themselves.

Runs are interleaved (uncached, accelerated, accelerated, uncached, ...) after a warm-up, so that
a machine that slows down in between slows both. What is timed is the whole pipeline call, text
encoder and decoder included.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from blockcache import api
from blockcache.errors import BlockCacheError
from blockcache.plan import Plan, Recipe
from blockcache.tuning import environment, quality
from blockcache.tuning.comparison import Comparison, Entry, Picture
from blockcache.tuning.stage import Item, Stage, items_of, plain

What: TypeAlias = str | Path | Recipe | Plan
_TRIALS = 3


@dataclass(frozen=True)
class Arm:
    """One way of rendering, raced against the others.

    steps: where they differ from the others'. within: makes the context it renders in. objection:
    why it cannot run; then it is listed and not run.
    """

    name: str
    steps: int | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    objection: str = ""


@dataclass(frozen=True)
class Trial:
    """What the warm-up showed, for whoever sets up rivals to race against.

    computed: per step the share of the blocks that were computed, mean over the branches.
    sigmas, timesteps: the sampler's in the uncached run, sigmas with the final one; None where it
    has none. seconds: times other arms on the same item.
    """

    pipe: Any
    steps: int
    baseline_s: float
    accelerated_s: float
    computed: tuple[float, ...]
    sigmas: torch.Tensor | None
    timesteps: torch.Tensor
    seconds: Callable[[Arm], float]


Rivals: TypeAlias = Callable[[Trial], Sequence[Arm]]


def compare(
    pipe: Any,
    what: What = "balanced",
    prompts: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    repeats: int = 3,
    *,
    rivals: Rivals | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **call_kwargs: Any,
) -> Comparison:
    """Render `prompts` with and without the cache, from the same noise.

    The pipeline is left disabled, giving what it gave before bit for bit.

    Args:
        pipe: Any diffusers pipeline that blockcache supports.
        what: A word ("quality", "balanced", "fast"), a recipe or its name, a plan or its file.
        prompts: At least one; class numbers for a pipeline that takes `class_labels`.
        seeds: One per prompt; 0, 1, ... if None. Each item has a CPU generator of its own.
        repeats: Times every picture is rendered; only seconds need more than one.
        rivals: Called with the warm-up's findings, gives other ways to race in the same loop.
        on_progress: Called with (renders done, renders in all) after each render.
        call_kwargs: Passed to every pipeline call, for example `num_inference_steps=28`.

    Raises:
        BlockCacheError: no prompts, impossible arguments, or an unsupported model.
    """
    items = items_of(prompts, seeds)
    if repeats < 1:
        raise BlockCacheError(f"repeats must be at least 1, found {repeats}")
    stage = Stage(pipe, call_kwargs)
    cached = _Cached(pipe, api.read(what))
    # Impossible requests are refused before anything is rendered.
    with cached.within():
        pass
    arms = [Arm("uncached"), Arm(_name(what, cached.chosen), within=cached.within)]
    _render(stage, arms[0], items[0])
    plan = api.plan_for(pipe, cached.chosen, stage.steps, stage.levels())
    offered = rivals(_trial(stage, arms, cached, items[0])) if rivals else []
    arms += [arm for arm in offered if not arm.objection]
    race = _Race(stage, arms, cached, items)
    race.run(repeats, on_progress)
    uncached, accelerated, *others = race.entries()
    return Comparison(
        model=type(pipe).__name__,
        pipeline=type(pipe).__name__,
        plan=plan,
        steps=stage.steps,
        prompts=tuple(prompt for prompt, _ in items),
        seeds=tuple(seed for _, seed in items),
        settings=plain(call_kwargs),
        baseline=uncached,
        accelerated=accelerated,
        rivals=tuple(others),
        objections={arm.name: arm.objection for arm in offered if arm.objection},
        summaries=tuple(race.summaries),
        floor_db=race.floor_db,
        peak_gib=race.peaks or None,
        versions=environment.versions(),
        machine={**environment.machine(stage.device), "dtype": stage.dtype},
    )


def _name(what: What, chosen: Recipe | Plan) -> str:
    """What the user called it; a file by what is in it."""
    if isinstance(what, str) and what.isidentifier():
        return what
    return chosen.recipe.name if isinstance(chosen, Plan) else chosen.name


class _Cached:
    """The pipeline with the cache on, and the summary of its last run."""

    def __init__(self, pipe: Any, chosen: Recipe | Plan) -> None:
        self.pipe, self.chosen = pipe, chosen
        self.summary: dict[str, Any] = {}

    @contextmanager
    def within(self) -> Iterator[None]:
        """Enabled inside, disabled after."""
        with api.enabled(self.pipe, self.chosen):
            yield
            self.summary = api.summary(self.pipe).as_dict()


def _render(stage: Stage, arm: Arm, item: Item) -> tuple[Picture, float]:
    """One picture and the seconds from the call to floats on the host."""
    with arm.within():
        found = stage.render(item, arm.steps)
    if found.picture is None:
        raise RuntimeError("a render without a picture")
    return found.picture, found.seconds


def _trial(stage: Stage, arms: Sequence[Arm], cached: _Cached, item: Item) -> Trial:
    """Every arm warm, and timed in turns; the least of a few, for noise only ever adds."""
    sigmas, timesteps = stage.sigmas(), torch.as_tensor(stage.pipe.scheduler.timesteps).clone()
    _render(stage, arms[1], item)
    seconds = [[_render(stage, arm, item)[1] for arm in arms] for _ in range(_TRIALS)]
    baseline_s, accelerated_s = map(min, zip(*seconds, strict=True))
    return Trial(
        pipe=stage.pipe,
        steps=stage.steps,
        baseline_s=baseline_s,
        accelerated_s=accelerated_s,
        computed=_computed(cached.summary),
        sigmas=sigmas,
        timesteps=timesteps,
        seconds=lambda arm: min(_render(stage, arm, item)[1] for _ in range(_TRIALS)),
    )


def trial_of(stage: Stage, chosen: Recipe | Plan, item: Item) -> Trial:
    """The findings on `chosen` that rivals are set up from."""
    cached = _Cached(stage.pipe, chosen)
    arms = [Arm("uncached"), Arm("cached", within=cached.within)]
    _render(stage, arms[0], item)
    return _trial(stage, arms, cached, item)


def _computed(summary: Mapping[str, Any]) -> tuple[float, ...]:
    """Per step the share of computed blocks, mean over branches; denoisers follow each other."""
    shares: list[float] = []
    for model in summary["models"]:
        by_step = zip(*(branch["map"] for branch in model["branches"]), strict=False)
        shares += [statistics.fmean(statistics.fmean(row) for row in rows) for rows in by_step]
    return tuple(shares)


class _Race:
    """Renders every item with every arm, in turns. Arm 0 is uncached, arm 1 has the cache."""

    def __init__(
        self, stage: Stage, arms: Sequence[Arm], cached: _Cached, items: Sequence[Item]
    ) -> None:
        self.stage, self.arms, self.cached, self.items = stage, arms, cached, items
        self.seconds: list[list[list[float]]] = [[[] for _ in items] for _ in arms]
        self.pictures: list[list[Picture]] = [[] for _ in arms]
        self.summaries: list[dict[str, Any]] = []
        self.floor_db = quality.CAP_DB
        self.peaks: dict[str, float] = {}

    def run(self, repeats: int, on_progress: Callable[[int, int], None] | None) -> None:
        """All renders, and one more for the determinism floor if nothing is rendered twice."""
        for arm in self.arms:
            _render(self.stage, arm, self.items[0])
        order = range(len(self.arms))
        total, done = repeats * len(self.items) * len(self.arms), 0
        for repeat in range(repeats):
            for i in range(len(self.items)):
                # Turning the order around cancels whatever going first is worth.
                for k in reversed(order) if (repeat + i) % 2 else order:
                    self._render(k, i)
                    done += 1
                    if on_progress:
                        on_progress(done, total)
        if repeats == 1:
            self._note_floor(0, _render(self.stage, self.arms[0], self.items[0])[0])

    def _render(self, k: int, i: int) -> None:
        on_gpu = self.stage.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.stage.device)
        picture, seconds = _render(self.stage, self.arms[k], self.items[i])
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self.stage.device) / 2**30
            self.peaks[self.arms[k].name] = max(peak, self.peaks.get(self.arms[k].name, 0.0))
        self.seconds[k][i].append(seconds)
        if len(self.seconds[k][i]) == 1:
            self.pictures[k].append(picture)
            if k == 1:
                self.summaries.append(self.cached.summary)
        elif k == 0:
            self._note_floor(i, picture)

    def _note_floor(self, i: int, picture: Picture) -> None:
        self.floor_db = min(self.floor_db, quality.psnr(picture, self.pictures[0][i]))

    def entries(self) -> list[Entry]:
        """One per arm, in their order."""
        return [self._entry(k) for k in range(len(self.arms))]

    def _entry(self, k: int) -> Entry:
        pairs = zip(self.pictures[k], self.pictures[0], strict=True)
        scores = tuple(quality.scores(picture, reference) for picture, reference in pairs)
        seconds = tuple(tuple(row) for row in self.seconds[k])
        arm = self.arms[k]
        steps = arm.steps or self.stage.steps
        return Entry(arm.name, steps, seconds, scores, tuple(self.pictures[k]))
