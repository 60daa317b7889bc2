"""One run of a pipeline with somebody watching: progress, previews, times by part, and Stop.

Everything is seen through the pipeline's own step callback and through forward hooks on the
denoiser; nothing is patched. What watching itself costs is taken off the seconds.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from blockcache import api
from blockcache.engine.stats import ratios
from blockcache.tuning import quality
from blockcache.tuning.comparison import Picture
from blockcache.tuning.stage import Item, Stage

_SAMPLE = 1 << 16
"""Elements of the latents that are kept of each step; all of them in a small model."""
_CALLBACKS = ("callback_on_step_end", "callback")


class Stopped(Exception):
    """A run was told to stop."""


Check = Callable[[], None]
"""Raises whatever ends the run; called before every call of the denoiser and after every step."""
OnStep = Callable[[int, torch.Tensor | None], None]
"""Called after every step with the number of steps done and the latents."""


@dataclass(frozen=True)
class StepTime:
    """seconds: of the step. denoiser_s: of that, in the denoiser."""

    seconds: float
    denoiser_s: float


@dataclass(frozen=True, eq=False)
class Side:
    """One finished run.

    seconds: the whole call, without what watching cost. before_s, after_s: of that, before the
    first step and after the last. steps: the rest. latents: a sample of them after every step, on
    the host. moved: per step the relative L1 change of the denoiser's output from the step before.
    measured: (step, change) as the cache itself saw it, in the first branch.
    """

    picture: Picture
    seconds: float
    before_s: float
    after_s: float
    steps: tuple[StepTime, ...]
    latents: tuple[torch.Tensor, ...]
    moved: tuple[float | None, ...]
    measured: tuple[tuple[int, float], ...] = ()

    @property
    def size(self) -> int:
        """Bytes it takes to keep."""
        return self.picture.nbytes + sum(t.nbytes for t in self.latents)


def render(
    pipe: Any, item: Item, call: Mapping[str, Any], check: Check, on_step: OnStep
) -> tuple[Side, Stage]:
    """One run, and the stage it stood on.

    Raises:
        BlockCacheError: arguments the pipeline does not take.
        Exception: what `check` raises, once the pipeline has been left.
    """
    stage = Stage(pipe, call, "the demo")
    watch = _Watch(stage, check, on_step)
    # The stage renders; it reaches the pipeline through us, so that the callback is there.
    stage.pipe = _Watched(pipe, watch)
    with watch.hooked():
        watch.started = watch.now()
        found = stage.render(item)
        ended = watch.now()
    if found.picture is None:
        raise RuntimeError("a render without a picture")
    return watch.side(found.picture, found.seconds, ended), stage


def distances_db(side: Side, reference: Side) -> list[float]:
    """How far the latents are from the reference's after every step, in dB; more is nearer."""
    pairs = zip(side.latents, reference.latents, strict=False)
    distances = [quality.relative_l2(ours, theirs) for ours, theirs in pairs]
    return [float(-20 * torch.log10(torch.tensor(max(d, 1e-6)))) for d in distances]


class _Watched:
    """Stands in for the pipeline where the stage calls it."""

    def __init__(self, pipe: Any, watch: "_Watch") -> None:
        self._pipe, self._watch = pipe, watch

    def __call__(self, **arguments: Any) -> Any:
        """Call the pipeline with our callback."""
        return self._pipe(**arguments, **self._watch.callback(type(self._pipe)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


@dataclass
class _Watch:
    """What is noted while a pipeline runs. Times are without what noting them took."""

    stage: Stage
    check: Check
    on_step: OnStep
    started: float = 0.0
    first_call: float | None = None
    ends: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    moved: list[float | None] = field(default_factory=list)
    measured: list[tuple[int, float]] = field(default_factory=list)
    spent_s: float = 0.0
    _entered: float = 0.0
    _busy_s: float = 0.0
    _output: torch.Tensor | None = None
    _before: torch.Tensor | None = None
    _seen: int = 0

    def now(self) -> float:
        """Seconds on a clock that stands still while we look."""
        self.stage.synchronise()
        return time.perf_counter() - self.spent_s

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """What happens inside takes no time on our clock."""
        self.stage.synchronise()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent_s += time.perf_counter() - began

    # ---- what the pipeline calls ---------------------------------------------------------------

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Forward hooks on the denoisers, for the length of a `with` block."""
        with ExitStack() as hooks:
            for model in api.denoisers(self.stage.pipe).values():
                hooks.callback(model.register_forward_pre_hook(self._enter).remove)
                hooks.callback(model.register_forward_hook(self._leave).remove)
            yield

    def callback(self, pipeline: type) -> dict[str, Any]:
        """The argument that has the pipeline tell us about its steps, if it can."""
        parameters = inspect.signature(pipeline.__call__).parameters
        names = [name for name in _CALLBACKS if name in parameters]
        return {names[0]: self._step} if names else {}

    def _enter(self, model: Any, args: Any) -> None:
        self.check()
        self._entered = self.now()
        if self.first_call is None:
            self.first_call = self._entered

    def _leave(self, model: Any, args: Any, output: Any) -> None:
        self._busy_s += self.now() - self._entered
        if self._output is None:
            with self._looking():
                self._output = _sampled(_tensor_of(output))
        if not self.stage.shows_latents:
            self._end_step(None)

    def _step(self, *args: Any) -> dict[str, Any]:
        # (pipe, i, t, {"latents": ...}) or, in pipelines of old, (i, t, latents).
        seen = args[-1]
        self._end_step(seen["latents"] if isinstance(seen, dict) else seen)
        return {}

    def _end_step(self, latents: torch.Tensor | None) -> None:
        self.ends.append(self.now())
        self.busy.append(self._busy_s)
        self._busy_s = 0.0
        with self._looking():
            if latents is not None:
                self.latents.append(_sampled(latents))
            self._note_changes()
            self.on_step(len(self.ends), latents)
        self.check()

    def _note_changes(self) -> None:
        before, self._before, self._output = self._before, self._output, None
        self.moved.append(_change(self._before, before))
        for attachment in api.attachments(self.stage.pipe).values():
            run = getattr(attachment.engine, "last_run", None)
            pairs = run.branches[0].changes if run is not None and run.branches else []
            # What was added since the last step was measured in this one.
            for pair in pairs[self._seen :]:
                self.measured += [(len(self.ends) - 1, change) for change in ratios([pair])]
            self._seen = len(pairs)
            break

    # ---- afterwards ----------------------------------------------------------------------------

    def side(self, picture: Picture, seconds: float, ended: float) -> Side:
        """All that was noted."""
        first = self.started if self.first_call is None else min(self.first_call, *self.ends)
        starts = [first, *self.ends]
        steps = tuple(
            StepTime(end - start, min(busy, end - start))
            for start, end, busy in zip(starts, self.ends, self.busy, strict=False)
        )
        return Side(
            picture=picture,
            seconds=max(seconds - self.spent_s, 1e-9),
            before_s=first - self.started,
            after_s=ended - starts[-1],
            steps=steps,
            latents=tuple(self.latents),
            moved=tuple(self.moved),
            measured=tuple(self.measured),
        )


def _tensor_of(output: Any) -> torch.Tensor | None:
    found = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    return found if isinstance(found, torch.Tensor) else None


def _sampled(tensor: torch.Tensor | None) -> Any:
    """A fixed part of the elements, float32 on the host; None of None."""
    if tensor is None:
        return None
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].float().cpu().clone()


def _change(now: torch.Tensor | None, before: torch.Tensor | None) -> float | None:
    if now is None or before is None or now.shape != before.shape:
        return None
    size = float(before.abs().mean())
    return float((now - before).abs().mean()) / size if size > 0 else None
