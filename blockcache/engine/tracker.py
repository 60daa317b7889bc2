"""Know run, step and branch, passively: nothing is patched on pipeline, scheduler or model.

A *run* is one identity of `scheduler.timesteps`, which every pipeline call makes anew. A *step* is
one value of `scheduler.step_index` or, for the schedulers without one, of the timestep. A
*branch* (cond, uncond, ...) is told by the conditioning tensor it gets, else by the order of the
call within the step.
"""

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from blockcache.plan.steps import Step, steps_from_sigmas

_MOST_BRANCHES = 8
_HOST_NAMES = ("self", "components", "pipe", "pipeline")
_DENOISER_NAMES = ("transformer", "transformer_2", "unet", "unet_2", "prior", "decoder", "dit")


@dataclass(frozen=True)
class Moment:
    """One denoiser call: whether it opens a run, which step it is in, its order in the step."""

    is_new_run: bool
    step: Step
    call: int


class Tracker:
    """Turns denoiser calls into moments. One per thread."""

    def __init__(self) -> None:
        """Start outside any run."""
        self._scheduler: Any = None
        self._timesteps: Any = None
        self._position: Any = None
        self._first_position: Any = None
        self._first = 0
        self._index = 0
        self._call = 0
        self.steps: tuple[Step, ...] = ()
        self.scheduled = 0

    def locate(self, scheduler: Any, timestep: Any) -> Moment:
        """Place the call that is about to happen.

        Reads the timestep from the device only for schedulers without `step_index`.
        """
        position = _position(scheduler, timestep)
        is_new_run = self._is_new_run(scheduler, position)
        if is_new_run:
            self._start(scheduler, timestep, position)
        elif position != self._position:
            self._advance(position)
        else:
            self._call += 1
        self._position = position
        return Moment(is_new_run, self.steps[self._index], self._call)

    def takes_over_from(self, other: "Tracker") -> bool:
        """Whether both follow one run and this one is at a later step: two experts in turn."""
        is_same_run = self._timesteps is not None and self._timesteps is other._timesteps
        return is_same_run and self._position != other._position

    def forget(self) -> None:
        """The next call opens a new run."""
        self._timesteps = None

    def _is_new_run(self, scheduler: Any, position: Any) -> bool:
        if scheduler is not self._scheduler or scheduler.timesteps is not self._timesteps:
            return True
        # The same timesteps walked again: a caller's own loop that does not set them anew.
        if isinstance(position, int):
            return self._first + self._index > position
        return bool(position == self._first_position and position != self._position)

    def _start(self, scheduler: Any, timestep: Any, position: Any) -> None:
        self._scheduler, self._timesteps = scheduler, scheduler.timesteps
        levels = _noise_levels(scheduler)
        self.scheduled = len(levels)
        self._first_position = position
        self._first = min(_start_index(scheduler, timestep, position), len(levels) - 1)
        # Image-to-image enters late: its run is what is left of the schedule.
        rest = levels[self._first :]
        times, strides = _times(scheduler), strides_of(scheduler)
        self.steps = steps_from_sigmas(
            rest, times[self._first :], strides and strides[self._first :]
        )
        self._index = self._call = 0

    def _advance(self, position: Any) -> None:
        self._call = 0
        ahead = position - self._first if isinstance(position, int) else self._index + 1
        self._index = min(ahead, len(self.steps) - 1)


def _position(scheduler: Any, timestep: Any) -> Any:
    """What changes from step to step: an int where the scheduler counts, else a value."""
    if hasattr(scheduler, "step_index"):
        index = scheduler.step_index
        if index is None:
            begin = getattr(scheduler, "begin_index", None)
            return 0 if begin is None else begin
        return int(index)
    # PNDM repeats timesteps and counts its own steps; nobody else has a counter.
    return (_scalar(timestep), getattr(scheduler, "counter", None))


def _start_index(scheduler: Any, timestep: Any, position: Any) -> int:
    if isinstance(position, int):
        return position
    value = _scalar(timestep)
    listed = _floats(scheduler.timesteps)
    if value is None or value not in listed:
        return 0
    return listed.index(value)


def _scalar(timestep: Any) -> float | None:
    if isinstance(timestep, torch.Tensor):
        return float(timestep.max()) if timestep.numel() else None
    return None if timestep is None else float(timestep)


def _noise_levels(scheduler: Any) -> list[float]:
    """One noise level per step: sigmas where the scheduler has them, else timesteps."""
    timesteps = _floats(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) < len(timesteps):
        return timesteps
    return _floats(sigmas)[: len(timesteps)]


def _times(scheduler: Any) -> list[float]:
    """Timesteps as shares of the longest one the model was trained with."""
    config = getattr(scheduler, "config", {})
    longest = float(config.get("num_train_timesteps", None) or 1000)
    return [min(t / longest, 1.0) for t in _floats(scheduler.timesteps)]


def strides_of(scheduler: Any) -> list[float] | None:
    """What each step multiplies the model's output by, where the sampler is a plain Euler."""
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    is_euler = (
        kind == "FlowMatchEulerDiscreteScheduler" and not config.get("stochastic_sampling")
    ) or (kind == "EulerDiscreteScheduler" and config.get("prediction_type") == "epsilon")
    if not is_euler:
        return None
    levels = _floats(scheduler.sigmas)
    falls = [after - before for before, after in zip(levels, levels[1:], strict=False)]
    return falls if len(falls) == len(scheduler.timesteps) else None


def _floats(values: Any) -> list[float]:
    """Plain floats, with one read from the device."""
    listed: list[float] = torch.as_tensor(values, dtype=torch.float64).tolist()
    return listed


def scheduler_of_caller(denoiser: nn.Module) -> Any:
    """The scheduler of the pipeline that is calling `denoiser` right now, or None."""
    return getattr(caller_of(denoiser), "scheduler", None)


def caller_of(denoiser: nn.Module) -> Any:
    """The pipeline that is calling `denoiser` right now, or None.

    Looked up on the call stack, so that pipelines which share a denoiser are told apart and a
    denoiser enabled without its pipeline is served too.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        local = frame.f_locals
        for name in _HOST_NAMES:
            host = local.get(name)
            if _is_host(host, denoiser):
                return host
        frame = frame.f_back
    return None


def _is_host(host: Any, denoiser: nn.Module) -> bool:
    if host is None or isinstance(host, nn.Module):
        return False
    if getattr(getattr(host, "scheduler", None), "timesteps", None) is None:
        return False
    parts = (getattr(host, name, None) for name in _DENOISER_NAMES)
    return any(
        part is not None and (part is denoiser or getattr(part, "_orig_mod", None) is denoiser)
        for part in parts
    )


@dataclass
class BranchNames:
    """Gives the calls of a step stable branch numbers within one run."""

    is_exchanged: bool = False
    """The branch of the last call has another conditioning than before: what it keeps is void."""
    _known: list["_Slot"] = field(default_factory=list)
    _used: set[int] = field(default_factory=set)

    def number(self, call: int, conditioning: torch.Tensor | None, form: Any) -> int:
        """The branch of this call.

        call: order within the step. conditioning: the tensor that differs between branches,
        recognised by identity. form: shapes and options of the call; another form is another
        branch in any case.
        """
        if call == 0:
            self._used.clear()
        found = self._by_identity(conditioning, form)
        self.is_exchanged = False
        if found is not None:
            self._known[found].is_kept = True
        else:
            found = self._by_order(form)
            # A host that keeps a text from step to step and comes with another one means it.
            self.is_exchanged = found is not None and self._known[found].is_kept
        if found is None:
            found = len(self._known)
            self._known.append(_Slot(form))
        self._known[found].see(conditioning)
        self._used.add(found)
        return found

    def _by_identity(self, conditioning: torch.Tensor | None, form: Any) -> int | None:
        for i, slot in enumerate(self._known):
            if i not in self._used and slot.form == form and slot.holds(conditioning):
                return i
        return None

    def _by_order(self, form: Any) -> int | None:
        free = [i for i, s in enumerate(self._known) if i not in self._used and s.form == form]
        # A slot whose own tensor still lives is waiting for that tensor, not for a stranger;
        # unless there are so many that the host must be keeping every step's tensors alive.
        waiting_is_normal = len(free) < _MOST_BRANCHES
        for i in free:
            if not (waiting_is_normal and self._known[i].is_waiting()):
                return i
        return None


class _Slot:
    def __init__(self, form: Any) -> None:
        self.form = form
        self.is_kept = False
        self._seen: weakref.ref[torch.Tensor] | None = None

    def see(self, conditioning: torch.Tensor | None) -> None:
        self._seen = None if conditioning is None else weakref.ref(conditioning)

    def holds(self, conditioning: torch.Tensor | None) -> bool:
        return conditioning is not None and self._seen is not None and self._seen() is conditioning

    def is_waiting(self) -> bool:
        return self._seen is not None and self._seen() is not None


def conditioning_of(named: dict[str, Any], order: Sequence[str]) -> torch.Tensor | None:
    """The tensor that tells branches apart: the text, else any other but latents and time."""
    for name in ("encoder_hidden_states", *order):
        value = named.get(name)
        is_latent_or_time = name in ("hidden_states", "sample", "x", "timestep", "t", "sigma")
        if isinstance(value, torch.Tensor) and not is_latent_or_time:
            return value
    return None
