"""Items to pictures. What goes wrong with an item stays with the item."""

import gc
import inspect
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from blockcache import api
from blockcache.errors import BlockCacheError
from blockcache.pipelines.generate.job import Chosen, Item
from blockcache.tuning.comparison import Picture

_LONGEST_REASON = 500
# Not in torch before 2.8.
_ACCELERATOR_ERROR: Any = getattr(torch, "AcceleratorError", ())


class DeviceError(RuntimeError):
    """The device failed, and with it every item that this process would still render."""


@dataclass(frozen=True, eq=False)
class Rendered:
    """What became of an item.

    seconds, baseline_s: its share of the pipeline call's wall time. counts: denoiser steps and
    block calls, over all branches. peak_gib: of the GPU in this call, else of the process so far.
    """

    item: Item
    picture: Picture | None = None
    baseline: Picture | None = None
    seconds: float = 0.0
    baseline_s: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    peak_gib: float = 0.0
    batch: int = 1
    error: str = ""


class Renderer:
    """Renders batches with one pipeline. most: items in one call; halved when memory runs out."""

    def __init__(self, pipe: Any, most: int, with_baseline: bool) -> None:
        """Look at what the pipeline takes."""
        self.pipe, self.most, self._with_baseline = pipe, most, with_baseline
        parameters = inspect.signature(type(pipe).__call__).parameters
        self._takes = (
            None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else {*parameters}
        )
        self._by_class = "prompt" not in parameters and "class_labels" in parameters
        self._device = torch.device(getattr(pipe, "_execution_device", pipe.device))

    def check(self, plan: Chosen, call: Sequence[str]) -> None:
        """Refuse what every item would fail for.

        Raises:
            BlockCacheError: the plan is for another model, or the pipeline takes no such arguments.
        """
        self._check_names(call)
        if plan.what is not None:
            with api.enabled(self.pipe, plan.what):
                pass

    def _check_names(self, call: Sequence[str]) -> None:
        unknown = sorted(set(call) - self._takes) if self._takes is not None else []
        if unknown:
            raise BlockCacheError(f"{type(self.pipe).__name__} takes no {', '.join(unknown)}")

    def render(self, items: Sequence[Item]) -> list[Rendered]:
        """A result for each item. Out of memory halves the batch, anything else is tried again.

        The second try is one item at a time, so that a bad item costs its batch mates nothing.

        Raises:
            DeviceError: the device failed.
        """
        try:
            return self._call(items)
        except Exception as caught:
            _check_device(caught)
            error, is_full = _described(caught), is_out_of_memory(caught)
        # Outside of the handler nothing holds on to the failed call's tensors any more.
        if not is_full:
            return [self._again(item) for item in items]
        self._free()
        if len(items) == 1:
            return [Rendered(items[0], error=error)]
        half = len(items) // 2
        self.most = min(self.most, max(half, 1))
        return self.render(items[:half]) + self.render(items[half:])

    def _again(self, item: Item) -> Rendered:
        try:
            return self._call([item])[0]
        except Exception as caught:
            _check_device(caught)
            error = _described(caught)
        self._free()
        return Rendered(item, error=error)

    def _call(self, items: Sequence[Item]) -> list[Rendered]:
        """One pipeline call, or two with the baseline. All items are of one form."""
        chosen = items[0].plan.what
        counts: dict[str, int] = {}
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        if chosen is None:
            pictures, seconds = self._run(items)
        else:
            with api.enabled(self.pipe, chosen):
                pictures, seconds = self._run(items)
                counts = counts_of(api.summary(self.pipe).as_dict())
        peak = self._peak_gib()
        plain: Sequence[Picture | None] = [None] * len(items)
        plain_s = 0.0
        if self._with_baseline:
            plain, plain_s = self._run(items)
        n = len(items)
        return [
            Rendered(item, picture, baseline, seconds / n, plain_s / n, counts, peak, n)
            for item, picture, baseline in zip(items, pictures, plain, strict=True)
        ]

    def _run(self, items: Sequence[Item]) -> tuple[list[Picture], float]:
        arguments = self._arguments(items)
        self._synchronise()
        started = time.perf_counter()
        output = self.pipe(**arguments)[0]
        self._synchronise()
        elapsed = time.perf_counter() - started
        pictures = [np.asarray(picture, dtype=np.float32) for picture in output]
        if len(pictures) != len(items):
            raise BlockCacheError(
                f"{len(items)} items gave {len(pictures)} pictures; this pipeline takes no "
                "batches, use --batch-size 1"
            )
        if not all(np.isfinite(picture).all() for picture in pictures):
            raise BlockCacheError("the picture holds values that are not numbers (NaN or infinity)")
        return pictures, elapsed

    def _arguments(self, items: Sequence[Item]) -> dict[str, Any]:
        call = dict(items[0].call)
        if "negative_prompt" in call:
            call["negative_prompt"] = [item.call["negative_prompt"] for item in items]
        self._check_names(list(call))
        prompts = [item.prompt for item in items]
        what = (
            {"class_labels": list(map(_class, prompts))} if self._by_class else {"prompt": prompts}
        )
        # Each item has its own generator, on the CPU: the noise depends on nothing but the seed.
        generators = [torch.Generator("cpu").manual_seed(item.seed) for item in items]
        return {**call, **what, "generator": generators, "output_type": "np"}

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _peak_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def counts_of(summary: dict[str, Any]) -> dict[str, int]:
    """The figures of a summary, over all branches of all denoisers."""
    names = ("steps", "computed", "reused", "block_calls", "block_calls_skipped")
    branches = [branch for model in summary["models"] for branch in model["branches"]]
    return {name: sum(branch[name] for branch in branches) for name in names}


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the device or on the host."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, kinds) or any(word in str(error).lower() for word in words)


def _check_device(error: Exception) -> None:
    """Tell an item's error from the end of the device.

    Raises:
        DeviceError: after this error every call of this process fails, whatever it renders.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return
    if isinstance(error, _ACCELERATOR_ERROR) or "CUDA error" in str(error):
        raise DeviceError(
            f"{_described(error)}; the device is of no more use to this process. No item is "
            "marked as failed; other processes, or the same command again, go on"
        ) from error


def _described(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    kind = "" if isinstance(error, BlockCacheError) else f"{type(error).__name__}: "
    return (kind + " ".join(lines[:2]))[:_LONGEST_REASON]


def _class(prompt: str) -> int:
    try:
        return int(prompt)
    except ValueError:
        raise BlockCacheError(f"this pipeline takes class numbers, found {prompt!r:.60}") from None
