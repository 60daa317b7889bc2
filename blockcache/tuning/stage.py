"""A pipeline and the arguments that all its runs share; renders one item at a time."""

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from blockcache.errors import BlockCacheError
from blockcache.tuning.comparison import Picture

Item: TypeAlias = tuple[str, int]
"""Prompt and seed."""

_EARLY_SHARE = 0.3
_OURS = ("prompt", "class_labels", "generator", "output_type", "return_dict")


def items_of(prompts: Sequence[str], seeds: Sequence[int] | None) -> list[Item]:
    """Prompts with their seeds; 0, 1, ... if none are given.

    Raises:
        BlockCacheError: no prompts, or as many seeds as prompts are not given.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if not prompts:
        raise BlockCacheError("no prompts: give at least one")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise BlockCacheError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one for each")
    return list(zip(prompts, seeds, strict=True))


@dataclass(frozen=True, eq=False)
class Render:
    """One run.

    picture: None if only latents were asked for. latents: float32 on the host, None where the
    pipeline does not show them. seconds: from the call to floats on the host. early: the latents
    after the steps of `checkpoints`, where they were asked for and are shown.
    """

    picture: Picture | None
    latents: torch.Tensor | None
    seconds: float
    early: tuple[torch.Tensor, ...] = ()


class Stage:
    """A pipeline and the arguments all runs share.

    Raises:
        BlockCacheError: arguments the pipeline does not take, or that are set here.
    """

    def __init__(self, pipe: Any, call_kwargs: Mapping[str, Any], who: str = "compare") -> None:
        parameters = inspect.signature(type(pipe).__call__).parameters
        self._callback = _callback_name(parameters)
        taken = sorted(set(call_kwargs) & {*_OURS, self._callback})
        if taken:
            raise BlockCacheError(f"{who}() sets {', '.join(taken)} itself; pass prompts and seeds")
        unknown = sorted(set(call_kwargs) - set(parameters))
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise BlockCacheError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
        default = parameters["num_inference_steps"].default
        self.steps = int(call_kwargs.get("num_inference_steps", default))
        if self.steps < 1:
            raise BlockCacheError(f"num_inference_steps must be at least 1, found {self.steps}")
        self.pipe, self.call_kwargs = pipe, dict(call_kwargs)
        self.by_class = "prompt" not in parameters and "class_labels" in parameters
        self.device = torch.device(getattr(pipe, "_execution_device", pipe.device))
        self.dtype = str(pipe.dtype).removeprefix("torch.")

    @property
    def shows_latents(self) -> bool:
        """Whether the pipeline tells its latents after every step."""
        return bool(self._callback)

    def render(self, item: Item, steps: int | None = None) -> Render:
        """The picture, and nothing that would cost time beside it."""
        return self._call(item, steps, {"output_type": "np"}, has_picture=True)

    def full(self, item: Item, steps: int | None = None, every_step: bool = False) -> Render:
        """Picture and final latents of one run.

        every_step: keep the latents after all steps as the early ones.
        """
        return self._watched(item, steps, {"output_type": "np"}, True, every_step)

    def latents(self, item: Item, steps: int | None = None) -> Render:
        """Final latents without decoding; the picture where the pipeline shows no latents."""
        if not self.shows_latents:
            return self.render(item, steps)
        return self._watched(item, steps, {"output_type": "latent"}, False)

    def _watched(
        self,
        item: Item,
        steps: int | None,
        more: dict[str, Any],
        has_picture: bool,
        every_step: bool = False,
    ) -> Render:
        if not self.shows_latents:
            return self._call(item, steps, more, has_picture)
        total = steps or self.steps
        wanted = tuple(range(total)) if every_step else checkpoints(total)
        kept: dict[int, torch.Tensor] = {}

        def keep(*args: Any) -> dict[str, Any]:
            # (pipe, i, t, {"latents": ...}) or, in pipelines of old, (i, t, latents).
            step, seen = args[-3], args[-1]
            latents = seen["latents"] if isinstance(seen, dict) else seen
            kept[-1] = latents
            if step in wanted:
                kept[step] = latents
            return {}

        found = self._call(item, steps, {**more, self._callback: keep}, has_picture)
        on_host = {step: latents.detach().float().cpu() for step, latents in kept.items()}
        early = tuple(on_host[step] for step in wanted if step in on_host)
        return Render(found.picture, on_host.get(-1), found.seconds, early)

    def _call(
        self, item: Item, steps: int | None, more: dict[str, Any], has_picture: bool
    ) -> Render:
        prompt, seed = item
        arguments = {
            **self.call_kwargs,
            "num_inference_steps": steps or self.steps,
            **({"class_labels": [_class(prompt)]} if self.by_class else {"prompt": prompt}),
            "generator": torch.Generator("cpu").manual_seed(seed),
            # Pictures as "np" are float: nothing passes through 8 bits.
            **more,
        }
        self.synchronise()
        started = time.perf_counter()
        output = self.pipe(**arguments)[0]
        self.synchronise()
        elapsed = time.perf_counter() - started
        picture = np.asarray(output[0], dtype=np.float32) if has_picture else None
        return Render(picture, None, elapsed)

    def sigmas(self) -> torch.Tensor | None:
        """Noise levels of the last run, one per step and the final one; None without any."""
        scheduler = self.pipe.scheduler
        sigmas = getattr(scheduler, "sigmas", None)
        # Samplers that call the model twice in a step have more; they are no list of steps.
        if sigmas is None or not len(sigmas) == len(scheduler.timesteps) + 1 == self.steps + 1:
            return None
        return torch.as_tensor(sigmas).clone()

    def levels(self) -> list[float] | None:
        """What the engine places the last run's steps by: sigmas or, without any, timesteps."""
        sigmas = self.sigmas()
        levels = self.pipe.scheduler.timesteps if sigmas is None else sigmas[:-1]
        found: list[float] = torch.as_tensor(levels, dtype=torch.float64).tolist()
        return found if len(found) == self.steps else None

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def checkpoints(steps: int) -> tuple[int, ...]:
    """Four steps in the first three tenths of a run, where the layout of a picture is decided."""
    last = max(1, round(_EARLY_SHARE * steps) - 1)
    return tuple(sorted({max(1, round(last * k / 4)) for k in range(1, 5)}))


def final_of(found: Render) -> NDArray[np.float32]:
    """The final latents, or the picture where the pipeline does not show them."""
    if found.latents is not None:
        return found.latents.numpy()
    if found.picture is None:
        raise RuntimeError("a run without latents and without a picture")
    return found.picture


def early_of(found: Render) -> NDArray[np.float32]:
    """The early latents, `[C, ...]`."""
    if not found.early:
        return np.zeros((0, 1), np.float32)
    return torch.stack(found.early).numpy()


def _callback_name(parameters: Mapping[str, Any]) -> str:
    for name in ("callback_on_step_end", "callback"):
        if name in parameters:
            return name
    return ""


def _class(prompt: str) -> int:
    try:
        return int(prompt)
    except ValueError:
        raise BlockCacheError(f"this pipeline takes class numbers, found {prompt!r}") from None


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold as it is, the rest by its type."""
    simple = (str, int, float, bool, type(None), list, tuple, dict)
    return {k: v if isinstance(v, simple) else type(v).__name__ for k, v in settings.items()}
