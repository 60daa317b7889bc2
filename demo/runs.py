"""What the page can do, without the page: compare, tune, and keep what is worth keeping.

One worker does one thing at a time, so that seconds are comparable whoever else is waiting. The
uncached run is kept by its settings: a change of plan costs one run.
"""

import inspect
import json
import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blockcache import api, tune
from blockcache.demo import media, shelf, story
from blockcache.demo.desk import Desk, Job, Progress
from blockcache.demo.preview import Preview
from blockcache.demo.settings import Limits, Settings, SettingsError, checked
from blockcache.demo.shelf import Tuned
from blockcache.demo.visits import Pair, Visit, Visits, slug
from blockcache.demo.watch import Side, render
from blockcache.errors import BlockCacheError
from blockcache.pipelines import models, options
from blockcache.plan import Fingerprint, Plan, Recipe
from blockcache.tuning import quality

_MOST_LOADED = 2
_MOST_KEPT_BYTES = 2**30
_WARM_STEPS = 2
_TUNE_GRACE_MIN = 1.0
"""A tuning keeps its limit itself, then times its plan."""


@dataclass(frozen=True, eq=False)
class Studio:
    """A loaded model. plans: those that came with it."""

    model: models.Model
    pipe: Any
    mark: Fingerprint
    plans: tuple[Tuned, ...]

    @property
    def is_video(self) -> bool:
        """Whether it makes videos."""
        return "num_frames" in inspect.signature(type(self.pipe).__call__).parameters

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.pipe.device)


@dataclass(frozen=True)
class Defaults:
    """What the settings of a model begin with. None: only the loaded model knows."""

    steps: int | None
    height: int | None
    width: int | None
    frames: int | None
    guidance: float | None
    is_video: bool
    prompts: tuple[str, ...]

    @classmethod
    def of(cls, model: models.Model, pipeline: type | None) -> "Defaults":
        """By the model's own settings, else by what its pipeline's call says."""
        parameters = inspect.signature(pipeline.__call__).parameters if pipeline else {}
        known = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        known |= model.call
        return cls(
            steps=known.get("num_inference_steps"),
            height=known.get("height"),
            width=known.get("width"),
            frames=known.get("num_frames"),
            guidance=known.get("guidance_scale"),
            is_video="num_frames" in known,
            prompts=model.prompts,
        )


class Workshop:
    """Everything behind the page."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        limits: Limits | None = None,
        plans: Sequence[Tuned] = (),
        any_model: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Load nothing yet.

        names: Models that may be chosen, the first one is where everybody begins. folder: What is
        made goes below it. plans: At hand for everybody. any_model: Whether visitors may name
        other models.
        """
        self.names, self.limits, self.any_model = tuple(names), limits or Limits(), any_model
        self.shared_plans = tuple(plans)
        self.visits, self.desk = Visits(folder), Desk()
        self._device, self._dtype, self._threads = device, dtype, threads
        self._all_threads = torch.get_num_threads()
        self._studios: OrderedDict[str, Studio] = OrderedDict()
        self._kept = Kept(_MOST_KEPT_BYTES)
        self._warm: set[tuple[Any, ...]] = set()

    def close(self) -> None:
        """End what runs and remove what was written."""
        self.desk.close()
        self.visits.close()

    # ---- models --------------------------------------------------------------------------------

    def allowed(self, name: str) -> str:
        """The model's name, if a visitor may take it; the first one if they named none.

        Raises:
            SettingsError: they may not.
        """
        name = name or (self.names[0] if self.names else "")
        if name in self.names or (self.any_model and name):
            return name
        known = ", ".join(self.names) or "none; this page only browses"
        raise SettingsError(f"the model {name[:80]!r} is not offered here (offered: {known})")

    def defaults(self, name: str) -> "Defaults":
        """What the settings begin with for this model."""
        studio = self.loaded(name)
        found = studio.model if studio else models.find(name)
        pipeline = type(studio.pipe) if studio else _pipeline_of(found)
        return Defaults.of(found, pipeline)

    def words(self) -> str:
        """The model and what it runs on, in a few words."""
        name = self.names[0]
        studio = self.loaded(name)
        if studio is None:
            return name
        dtype = str(studio.pipe.dtype).removeprefix("torch.")
        place = studio.device.type.upper()
        if studio.device.type == "cuda":
            place = torch.cuda.get_device_name(studio.device)
        return f"{name}, {type(studio.pipe).__name__}, {place}, {dtype}"

    def loaded(self, name: str) -> Studio | None:
        """The model if it is loaded; nothing is done."""
        return self._studios.get(name)

    def studio(self, name: str) -> Studio:
        """The model, loaded if need be; the one not used for longest makes room.

        Raises:
            ModelError: it cannot be loaded.
        """
        if name not in self._studios:
            while len(self._studios) >= _MOST_LOADED:
                self._studios.popitem(last=False)
            self._studios[name] = self._load(name)
        self._studios.move_to_end(name)
        is_embedded = name in models.EMBEDDED
        torch.set_num_threads(self._all_threads)
        options.set_threads(self._threads, is_embedded)
        return self._studios[name]

    def _load(self, name: str) -> Studio:
        options.quiet_hosts()
        found = models.find(name)
        place = models.device_for(self._device)
        dtype = options.dtype_name(self._dtype, place.type, name in models.EMBEDDED)
        pipe = models.load(found, place, getattr(torch, dtype))
        mark = api.plan_for(pipe, "balanced", 8).fingerprint
        own = shelf.plans_in(Path(found.source) / shelf.FOLDER) if found.is_local else []
        return Studio(found, pipe, mark, tuple(shelf.fitting(own, mark)))

    def plans_for(self, visit: Visit, name: str) -> list[Tuned]:
        """Plans that this visitor can take with that model: their own first."""
        studio = self.loaded(name)
        if studio is None:
            return [*visit.plans, *self.shared_plans]
        everywhere = shelf.fitting([*visit.plans, *self.shared_plans], studio.mark)
        return [*everywhere, *studio.plans]

    # ---- jobs ----------------------------------------------------------------------------------

    def compare(self, visit: Visit, asked: Mapping[str, Any], *, is_fresh: bool = False) -> Job:
        """Queue a comparison; its result is a `Pair`. is_fresh: measure the uncached side anew.

        Raises:
            BlockCacheError: settings outside the limits, or a job of this visitor's is under way.
        """
        settings = checked(asked, self.limits)
        settings = replace(settings, model=self.allowed(settings.model))

        def work(job: Job) -> Pair:
            return self._compare(job, visit, settings, is_fresh)

        return self._submit(visit, Job("compare", work, self.limits.minutes))

    def tune(
        self,
        visit: Visit,
        asked: Mapping[str, Any],
        prompts: Sequence[str],
        goal: Mapping[str, float],
        minutes: float,
        effort: str = "quick",
    ) -> Job:
        """Queue a tuning; its result is a `Tuned`. goal: One of psnr, ssim and speedup.

        asked: As for `compare`; only model, size and steps matter.

        Raises:
            BlockCacheError: as for `compare`, or no prompts.
        """
        if not prompts:
            raise BlockCacheError("no prompts: write at least one, one a line")
        longest = max(map(len, prompts))
        if longest > self.limits.prompt or len(prompts) > 64:
            raise SettingsError(
                f"at most 64 prompts of {self.limits.prompt:,} characters; found {len(prompts)}, "
                f"the longest of {longest:,}"
            )
        if not 0 < minutes <= self.limits.minutes:
            raise SettingsError(
                f"minutes must lie between 0 and {self.limits.minutes:g}, found {minutes:g}"
            )
        settings = checked({**asked, "prompt": prompts[0]}, self.limits)
        settings = replace(settings, model=self.allowed(settings.model))

        def work(job: Job) -> Tuned:
            return self._tune(job, visit, settings, prompts, goal, minutes, effort)

        return self._submit(visit, Job("tune", work, minutes + _TUNE_GRACE_MIN))

    def _submit(self, visit: Visit, job: Job) -> Job:
        if visit.is_busy:
            raise BlockCacheError("a run of yours is still under way; stop it or wait")
        self.desk.submit(job)
        visit.job = job
        return job

    # ---- comparing -----------------------------------------------------------------------------

    def _compare(self, job: Job, visit: Visit, settings: Settings, is_fresh: bool) -> Pair:
        job.progress = Progress(f"loading {settings.model}")
        studio = self.studio(settings.model)
        name, chosen = shelf.choose(settings, self.plans_for(visit, settings.model))
        call = studio.model.call | settings.call
        with remarks_of(job), api.enabled(studio.pipe, chosen):
            # Impossible requests are refused before anything is rendered.
            pass
        key = settings.uncached
        plain = None if is_fresh else self._kept.get(key)
        was_kept = plain is not None
        if plain is None:
            self._warm_up(job, studio, settings, call)
            plain = self._side(job, studio, settings, call, "uncached", "Run 1 of 2: ")
            self._kept.put(key, plain)
        with remarks_of(job), api.enabled(studio.pipe, chosen):
            fast = self._side(job, studio, settings, call, name, "" if was_kept else "Run 2 of 2: ")
            summary = api.summary(studio.pipe).as_dict()
        job.progress = Progress("comparing")
        return self._pair(
            job, visit, studio, settings, name, chosen, plain, fast, summary, was_kept
        )

    def _warm_up(
        self, job: Job, studio: Studio, settings: Settings, call: Mapping[str, Any]
    ) -> None:
        """The first run in a new form allocates and compiles; that is nobody's time."""
        form = tuple(sorted((k, v) for k, v in call.items() if k != "num_inference_steps"))
        if (settings.model, form) in self._warm:
            return
        job.progress = Progress("warming up")
        few = {**call, "num_inference_steps": _WARM_STEPS}
        render(studio.pipe, (settings.prompt, 0), few, job.check, lambda done, latents: None)
        self._warm.add((settings.model, form))

    def _side(
        self,
        job: Job,
        studio: Studio,
        settings: Settings,
        call: Mapping[str, Any],
        name: str,
        part: str,
    ) -> "Rendered":
        job.progress = Progress(name, part=part)
        preview = Preview(studio.pipe, int(call.get("height", 512)), int(call.get("width", 512)))
        total = _steps(studio.pipe, call)

        def on_step(done: int, latents: torch.Tensor | None) -> None:
            small = preview.after(done, latents)
            link = job.progress.preview if small is None else media.data_url(small)
            job.progress = Progress(name, done, total, link, part)

        on_gpu = studio.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(studio.device)
        item = (settings.prompt, settings.seed)
        side, stage = render(studio.pipe, item, call, job.check, on_step)
        peak = torch.cuda.max_memory_allocated(studio.device) / 2**30 if on_gpu else None
        return Rendered(side, stage.steps, stage.levels(), peak)

    def _pair(
        self,
        job: Job,
        visit: Visit,
        studio: Studio,
        settings: Settings,
        name: str,
        chosen: Recipe | Plan,
        plain: "Rendered",
        fast: "Rendered",
        summary: dict[str, Any],
        was_kept: bool,
    ) -> Pair:
        ours, theirs = fast.side.picture, plain.side.picture
        plan = api.plan_for(studio.pipe, chosen, fast.steps, fast.levels)
        number = secrets.token_hex(8)
        folder = visit.folder / number
        shot = media.write_pair(
            folder,
            (theirs, f"uncached  {plain.side.seconds:.2f} s"),
            (ours, f"{name}  {fast.side.seconds:.2f} s"),
            {"prompt": settings.prompt, "seed": settings.seed, "model": settings.model},
            name,
        )
        plan_file = f"{slug(name)}-plan.json"
        plan.save(folder / plan_file)
        peaks = (plain.peak_gib, fast.peak_gib)
        pair = Pair(
            id=number,
            settings=settings,
            name=name,
            steps=fast.steps,
            baseline_s=plain.side.seconds,
            seconds=fast.side.seconds,
            scores=quality.scores(ours, theirs),
            computed=story.computed_share(summary),
            density=story.density(summary),
            parts=story.parts_share(summary),
            cache_bytes=sum(model["cache_bytes"] for model in summary["models"]),
            peak_gib=None if peaks[0] is None or peaks[1] is None else (peaks[0], peaks[1]),
            plan=plan,
            story=story.tell(plain.side, fast.side, summary, plan, tuple(job.remarks)),
            shot=shot,
            plan_file=plan_file,
            is_fresh=not was_kept,
        )
        visit.keep(pair)
        return pair

    # ---- tuning --------------------------------------------------------------------------------

    def _tune(
        self,
        job: Job,
        visit: Visit,
        settings: Settings,
        prompts: Sequence[str],
        goal: Mapping[str, float],
        minutes: float,
        effort: str,
    ) -> Tuned:
        job.progress = Progress(f"loading {settings.model}")
        studio = self.studio(settings.model)
        job.progress = Progress("starting the search")
        call = studio.model.call | settings.call

        def check(*_: Any) -> None:
            # A tuning takes this as its sign to come back with the best it has.
            if job.is_stopped or job.is_late:
                raise KeyboardInterrupt

        def on_progress(now: Any) -> None:
            left = f"{now.doing}, at most {_time(now.seconds_left)} left"
            job.progress = Progress(left, round(now.runs), round(now.most_runs), unit="run")
            check()

        with ExitStack() as hooks, remarks_of(job):
            for model in api.denoisers(studio.pipe).values():
                hooks.callback(model.register_forward_pre_hook(check).remove)
            plan = tune(
                studio.pipe,
                list(prompts),
                seeds=range(settings.seed, settings.seed + len(prompts)),
                effort="full" if effort == "full" else "quick",
                minutes=minutes,
                on_progress=on_progress,
                psnr=goal.get("psnr"),
                ssim=goal.get("ssim"),
                speedup=goal.get("speedup"),
                **call,
            )
        (word, value), *_ = goal.items()
        unit = {"psnr": " dB", "ssim": " SSIM", "speedup": "x"}.get(word, "")
        tuned = visit.keep_plan(Tuned(f"tuned {value:g}{unit}", plan))
        visit.tuned_file = f"{slug(tuned.name)}.json"
        plan.save(visit.folder / visit.tuned_file)
        visit.last_tuned = tuned
        return tuned


@dataclass(frozen=True, eq=False)
class Rendered:
    """A side with what a plan for it needs to know."""

    side: Side
    steps: int
    levels: list[float] | None
    peak_gib: float | None


class Kept:
    """Uncached runs by their settings, as many as fit; the one not asked for longest goes."""

    def __init__(self, most_bytes: int) -> None:
        """Nothing is kept yet."""
        self._most_bytes = most_bytes
        self._runs: OrderedDict[tuple[Any, ...], Rendered] = OrderedDict()

    def get(self, key: tuple[Any, ...]) -> Rendered | None:
        """The run, or None."""
        if key in self._runs:
            self._runs.move_to_end(key)
        return self._runs.get(key)

    def put(self, key: tuple[Any, ...], run: Rendered) -> None:
        """Keep it, and at least it."""
        self._runs[key] = run
        self._runs.move_to_end(key)
        while len(self._runs) > 1 and self._bytes() > self._most_bytes:
            self._runs.popitem(last=False)

    def _bytes(self) -> int:
        return sum(run.side.size for run in self._runs.values())


class _Listener(logging.Handler):
    """Collects what the engine says in one thread."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said, self._thread = said, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Note the message once."""
        text = record.getMessage()
        if record.thread == self._thread and text not in self._said:
            self._said.append(text)


@contextmanager
def remarks_of(job: Job) -> Iterator[None]:
    """What the engine warns of goes to the job, too."""
    log, listener = logging.getLogger("blockcache"), _Listener(job.remarks)
    log.addHandler(listener)
    try:
        yield
    finally:
        log.removeHandler(listener)


def _pipeline_of(model: models.Model) -> type | None:
    """The pipeline's class, read off a local folder; None where that takes loading."""
    import diffusers

    index = Path(model.source) / "model_index.json"
    if not (model.is_local and index.is_file()):
        return None
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    found = getattr(diffusers, str(name), None)
    return found if isinstance(found, type) else None


def _steps(pipe: Any, call: Mapping[str, Any]) -> int:
    parameters = inspect.signature(type(pipe).__call__).parameters
    return int(call.get("num_inference_steps", parameters["num_inference_steps"].default))


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
