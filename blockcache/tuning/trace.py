"""Calibration: run the pipeline uncached and write down how every payload moves over the steps.

A short run first shows how the streams flow, one whole run is timed, and then every prompt is run
once while the payloads' elements (of large ones a fixed random part) are kept per step. Their Gram
matrix, L1 distances and magnitudes make the `Trace`, from which calibrated recipes and the tuner
work on the host.
"""

import json
import logging
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn

from blockcache import api
from blockcache.engine import signals
from blockcache.engine.blocks import Blocks, find_blocks
from blockcache.engine.hooks import Call, Engine, attached
from blockcache.engine.identity import fingerprint, observed
from blockcache.engine.parts import Part, find_parts, main_input, scope_of
from blockcache.engine.tracker import BranchNames, Tracker, conditioning_of, scheduler_of_caller
from blockcache.engine.wiring import Watch, Wiring, bind, leaf_at
from blockcache.errors import BlockCacheError, PlanMismatchError, UnsupportedModelError
from blockcache.plan import Layout, MaskTable, Recipe, Rule, Site
from blockcache.plan.sites import SUB_LAYERS
from blockcache.plan.spec import to_json
from blockcache.plan.trace import (
    ABOUT,
    FORMAT,
    Arrays,
    Place,
    Trace,
    assembled,
    read_about,
    read_prompt,
    write_about,
    write_prompt,
)
from blockcache.tuning.comparison import Picture
from blockcache.tuning.stage import Item, Render, Stage, early_of, final_of, items_of, plain

logger = logging.getLogger("blockcache")

ELEMENTS = 1 << 16
"""Elements kept of a payload and step; more of a larger payload would tell little more."""
SAMPLE = 1 << 12
"""Raw values written per step, for what Gram matrices cannot tell."""
SCOPES = ("model", "stack", "block", "time", *SUB_LAYERS)
_MOST_BYTES = 1 << 30
_SCOUT_STEPS = 2
_SEEN, _NEAR = 64, 0.02
"""Values by which a run is known again, and how far apart they may be."""
_LATENT_NAMES = ("hidden_states", "sample", "x")


def trace(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    *,
    scopes: Sequence[str] = SCOPES,
    on_progress: Callable[[int, int], None] | None = None,
    **call_kwargs: Any,
) -> Trace:
    """Run `prompts` uncached and measure how much every part of the model changes between steps.

    The pipeline is left disabled. Costs about two runs more than there are prompts.

    Args:
        pipe: A pipeline with one denoiser.
        prompts: Calibration prompts, 4 to 8 of varied content; class numbers for a pipeline that
            takes `class_labels`.
        seeds: One per prompt; 0, 1, ... if None.
        out: Folder to write to, one file per finished prompt. An interrupted trace goes on from
            there when it is called again, and what is finished can be loaded.
        scopes: What to measure; fewer are quicker, for every block is some work in every step.
        on_progress: Called with (runs done, runs in all) after each run.
        call_kwargs: Passed to every pipeline call, for example `num_inference_steps=28`.

    Raises:
        BlockCacheError: no prompts, impossible arguments, or an unsupported model.
        PlanMismatchError: `out` holds the trace of something else.
    """
    stage = Stage(pipe, call_kwargs, "trace")
    folder = None if out is None else Path(out)
    return trace_items(stage, items_of(prompts, seeds), folder, scopes, on_progress)


def trace_items(
    stage: Stage,
    items: Sequence[Item],
    folder: Path | None,
    scopes: Sequence[str],
    on_progress: Callable[[int, int], None] | None = None,
    on_picture: Callable[[Item, Picture], None] | None = None,
) -> Trace:
    """As `trace`. on_picture: gets the uncached picture of every prompt that is run."""
    denoiser = only_denoiser(stage.pipe)
    api.disable(stage.pipe)
    report = on_progress or (lambda done, total: None)
    extra = 2
    scout = _Scout(denoiser, find_blocks(denoiser))
    with attached(scout):
        seen = _seen(stage.latents(items[0], min(_SCOUT_STEPS, stage.steps)))
    about = None if folder is None else _resumed(folder, stage, scout, items, seen)
    if about is None:
        about = {**_measured(stage, scout, items), "seen": seen}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_about(about, folder)
    report(extra, extra + len(items))
    recorder = _Recorder(scout, len(about["sigmas"]), scopes)
    found: list[tuple[int, Arrays]] = []
    for i, item in enumerate(items):
        arrays = None if folder is None else read_prompt(folder, i)
        if arrays is None:
            arrays = _traced(stage, recorder, item, on_picture)
            if folder is not None:
                write_prompt(arrays, i, folder)
        found.append((i, arrays))
        report(extra + i + 1, extra + len(items))
    return assembled(about, found)


def only_denoiser(pipe: Any) -> nn.Module:
    """The denoiser of a pipeline that has one.

    Raises:
        UnsupportedModelError: it has none, or two that share the steps.
    """
    found = api.denoisers(pipe)
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has {len(found)} denoisers ({', '.join(found)}); "
            "tracing and tuning work on pipelines with one"
        )
    return next(iter(found.values()))


# ---- engines ------------------------------------------------------------------------------------


class _Follower(Engine):
    """Knows step and branch of every call, and computes everything."""

    def __init__(self, denoiser: nn.Module, blocks: Blocks) -> None:
        self.denoiser, self.blocks = denoiser, blocks
        self.parts: tuple[Part, ...] = ()
        self.tracker = Tracker()
        self._arguments = signals.argument_names(denoiser)
        self._names = BranchNames()
        self.step, self.branch = 0, 0
        self.mark = fingerprint(denoiser, blocks)

    def locate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Find out step and branch of a denoiser call; returns its arguments by name."""
        scheduler = scheduler_of_caller(self.denoiser)
        if scheduler is None:
            raise BlockCacheError("no scheduler is in sight: tracing needs the pipeline's own loop")
        named = dict(zip(self._arguments, args, strict=False)) | kwargs
        moment = self.tracker.locate(scheduler, named.get("timestep", named.get("t")))
        if moment.is_new_run:
            self.mark = observed(self.denoiser, self.blocks, scheduler, named, self._arguments)
            self._names = BranchNames()
            self.begin_run()
        form = signals.form_of(named)
        conditioning = conditioning_of(named, self._arguments)
        self.step = moment.step.index
        self.branch = self._names.number(moment.call, conditioning, form)
        return named

    def begin_run(self) -> None:
        """A new run has begun."""

    def part(self, number: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a sub-layer."""
        return inner(*args, **kwargs)


class _Scout(_Follower):
    """Watches the first forward of every branch, and times the others."""

    def __init__(self, denoiser: nn.Module, blocks: Blocks) -> None:
        super().__init__(denoiser, blocks)
        self.wirings: dict[int, Wiring] = {}
        self.block_ms: dict[int, list[float]] = defaultdict(list)
        self.head_ms: list[float] = []
        self._inside_ms = 0.0
        self.first_s = self.last_s = 0.0
        self._watch: Watch | None = None
        self._is_cuda = any(p.is_cuda for p in denoiser.parameters())

    def forward(self, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Watch it if it is the branch's first, else time it."""
        self.locate(args, kwargs)
        self._watch = None if self.branch in self.wirings else Watch(self.blocks)
        self._inside_ms, started = 0.0, self._now()
        if self.tracker.steps and self.step == 0 and self.branch == 0:
            self.first_s = started
        output = inner(*args, **kwargs)
        self.last_s = self._now()
        if self._watch is None:
            self.head_ms.append(1e3 * (self.last_s - started) - self._inside_ms)
            return output
        try:
            self.wirings[self.branch] = self._watch.wiring()
        except ValueError as error:
            raise UnsupportedModelError(f"{type(self.denoiser).__name__}: {error}") from None
        return output

    def block(self, index: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute it, and note its streams or its milliseconds."""
        if self._watch is not None:
            self._watch.before(index, args, kwargs)
            output = inner(*args, **kwargs)
            self._watch.after(output)
            return output
        started = self._now()
        output = inner(*args, **kwargs)
        elapsed = 1e3 * (self._now() - started)
        self.block_ms[index].append(elapsed)
        self._inside_ms += elapsed
        return output

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class _Recorder(_Follower):
    """Keeps the payloads of one run, step by step."""

    def __init__(self, scout: _Scout, steps: int, scopes: Sequence[str]) -> None:
        super().__init__(scout.denoiser, scout.blocks)
        self._wirings, self._steps, self._scopes = scout.wirings, steps, scopes
        if set(scopes) & set(SUB_LAYERS):
            self.parts = find_parts(scout.blocks, SUB_LAYERS)
        self._limits = {branch: _chain_limits(w) for branch, w in self._wirings.items()}
        places = len(self._wirings) * (2 * len(self.blocks) + len(self.parts) + 8)
        self._most = max(1 << 8, min(ELEMENTS, _MOST_BYTES // (4 * steps * places)))
        self._kept: dict[Place, torch.Tensor] = {}
        self._numel: dict[Place, int] = {}
        self._magnitude: dict[Place, list[float]] = {}
        self._tokens: dict[Place, torch.Tensor] = {}
        self._elements: dict[int, torch.Tensor] = {}
        self._entered: dict[int, torch.Tensor] = {}

    def begin_run(self) -> None:
        """Forget the run before."""
        self._kept, self._magnitude, self._tokens = {}, {}, {}

    def forward(self, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute it and keep what went in and out of the model."""
        named = self.locate(args, kwargs)
        if self.branch not in self._wirings:
            raise BlockCacheError(
                f"the denoiser was called for a branch that a run of {_SCOUT_STEPS} steps does "
                "not have; tracing needs the same branches in every step"
            )
        entered = next((x for n in _LATENT_NAMES if _is_tensor(x := named.get(n))), None)
        before = None if entered is None else entered.clone()
        output = inner(*args, **kwargs)
        left = signals.main_tensor(output)
        if before is not None:
            self._keep("model", 0, "input", before)
        if left is not None:
            self._keep("model", 0, "output", left)
        if before is not None and left is not None and before.shape == left.shape:
            self._keep("model", 0, "residual", left - before)
        return output

    def block(self, index: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute it and keep what it did to the main stream."""
        wiring = self._wirings[self.branch]
        port = wiring.ports.get(index)
        if port is None:
            raise BlockCacheError("the model does not call the same blocks in every step")
        stream = next(iter(port.outputs))
        bound = bind(self.blocks.blocks[index], args, kwargs)
        entered = bound.get(port.inputs.get(stream, ""))
        starts, ends = self._limits[self.branch]
        is_wanted = index in starts or "block" in self._scopes
        before = entered.clone() if _is_tensor(entered) and is_wanted else None
        if index == wiring.called[0]:
            modulated = signals.modulated(self.blocks.blocks[index], stream, bound)
            if modulated is not None:
                self._keep("time", 0, "input", modulated)
        if before is not None and index in starts:
            self._entered[starts[index]] = before
        output = inner(*args, **kwargs)
        left = leaf_at(output, port.outputs[stream])
        if _is_tensor(left):
            if "block" in self._scopes:
                self._keep_pair("block", index, before, left)
            if index in ends:
                self._keep_pair("stack", ends[index], self._entered.pop(ends[index], None), left)
        return output

    def part(self, number: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a sub-layer and keep what it put out; of a whole transformer what it added."""
        entered = main_input(args, kwargs) if self.parts[number].kind == "transformer" else None
        before = None if entered is None else entered.clone()
        output = inner(*args, **kwargs)
        left = signals.main_tensor(output)
        if left is not None:
            scope = scope_of(self.parts[number], args, kwargs, output)
            self._keep_pair(scope, number, before, left)
        return output

    def _keep_pair(
        self, scope: str, index: int, before: torch.Tensor | None, left: torch.Tensor
    ) -> None:
        self._keep(scope, index, "output", left)
        # A U-Net's parts change the shape; there only the output can be kept.
        if before is not None and before.shape == left.shape:
            self._keep(scope, index, "residual", left - before)

    def _keep(self, scope: str, index: int, payload: str, value: torch.Tensor) -> None:
        if scope not in self._scopes:
            return
        place = Place(scope, index, payload, str(self.branch))
        flat = value.detach().reshape(-1)
        if flat.numel() > self._most:
            flat = flat[self._chosen(flat)]
        if place not in self._kept:
            shape = (self._steps, flat.numel())
            self._kept[place] = torch.full(shape, float("nan"), device=flat.device)
            self._magnitude[place] = [float("nan")] * self._steps
            self._numel[place] = value.numel()
        self._kept[place][self.step] = flat.float()
        tokens = value.detach().float().norm(dim=1 if self.blocks.unet else -1)
        last = self._tokens.get(place)
        ratio = 1.0 if last is None else float((tokens / last.clamp_min(1e-12)).mean())
        self._magnitude[place][self.step] = ratio
        self._tokens[place] = tokens

    def _chosen(self, flat: torch.Tensor) -> torch.Tensor:
        """The elements that are kept of a payload of this size: the same in every run."""
        size = flat.numel()
        if size not in self._elements:
            generator = torch.Generator().manual_seed(size)
            drawn = torch.randint(size, (self._most,), generator=generator)
            self._elements[size] = drawn.sort().values.to(flat.device)
        return self._elements[size]

    def arrays(self) -> Arrays:
        """The tables of the run that has just ended, by their names in files."""
        made: Arrays = {}
        for measured, kept in self._kept.items():
            place = self._in_its_row(measured)
            # Metal has no float64.
            values = (kept.cpu() if kept.device.type == "mps" else kept).double()
            made[f"{place}/numel"] = np.asarray([self._numel[measured]])
            made[f"{place}/gram"] = (values @ values.T / values.shape[1]).cpu().numpy()
            distances = torch.cdist(values, values, p=1) / values.shape[1]
            made[f"{place}/l1"] = distances.cpu().numpy()
            made[f"{place}/size"] = values.abs().mean(1).cpu().numpy()
            made[f"{place}/magnitude"] = np.asarray(self._magnitude[measured])
            made[f"{place}/sample"] = _sample(place, kept)
        return made

    def _in_its_row(self, place: Place) -> Place:
        """A sub-layer's place by its row in the site's mask, where it was kept by its number."""
        if place.scope not in SUB_LAYERS:
            return place
        own = (place.scope, place.branch)
        numbers = sorted({p.index for p in self._kept if (p.scope, p.branch) == own})
        return replace(place, index=numbers.index(place.index))


def _sample(place: Place, kept: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    wanted = SAMPLE if place.scope in ("stack", "model") else 0
    stride = max(1, -(-kept.shape[1] // SAMPLE))
    return kept[:, ::stride][:, :wanted].cpu().numpy()


def _chain_limits(wiring: Wiring) -> tuple[dict[int, int], dict[int, int]]:
    """First and last called block of every chain, with the chain's number."""
    starts, ends = {}, {}
    pieces = Site("stack").units(Layout(wiring.chains))
    for number, (lo, hi) in enumerate(pieces):
        inside = [i for i in wiring.called if lo <= i < hi]
        if inside:
            starts[inside[0]] = ends[inside[-1]] = number
    return starts, ends


def _is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


# ---- runs ---------------------------------------------------------------------------------------


def _traced(
    stage: Stage,
    recorder: _Recorder,
    item: Item,
    on_picture: Callable[[Item, Picture], None] | None,
) -> Arrays:
    with attached(recorder):
        found = stage.full(item) if on_picture else stage.latents(item)
    if on_picture and found.picture is not None:
        on_picture(item, found.picture)
    return {**recorder.arrays(), "latents": final_of(found), "early": early_of(found)}


def _measured(stage: Stage, scout: _Scout, items: Sequence[Item]) -> dict[str, Any]:
    """The trace's description: what is known and timed before any prompt is traced."""
    with attached(scout):
        timed = stage.latents(items[0]).seconds
    steps = scout.tracker.steps
    run = stage.latents(items[0]).seconds
    wiring = scout.wirings[0]
    inside_s = scout.last_s - scout.first_s
    # Where the pace changes, the second run may take less than what was fixed in the first.
    fixed = min(timed - inside_s, run * (1 - inside_s / timed))
    block_ms = [statistics.median(scout.block_ms.get(i) or [0.0]) for i in range(len(scout.blocks))]
    milliseconds = {
        "run": 1e3 * run,
        "fixed": 1e3 * fixed,
        "computed": 1e3 * (run - fixed) / len(steps),
        "reused": 1e3 * _reused_s(stage, items[0], fixed, len(steps)),
        "head": statistics.median(scout.head_ms),
        **_by_kind(scout.blocks, block_ms),
    }
    return {
        "blockcache_trace": FORMAT,
        "fingerprint": to_json(scout.mark),
        "sigmas": [step.sigma for step in steps],
        "prompts": [prompt for prompt, _ in items],
        "seeds": [seed for _, seed in items],
        "settings": plain(stage.call_kwargs),
        "chains": list(wiring.chains),
        "unet": scout.blocks.unet,
        "milliseconds": milliseconds,
        "block_ms": block_ms,
    }


def _reused_s(stage: Stage, item: Item, fixed: float, steps: int) -> float:
    """Seconds of one step that reuses the whole stack: hooks, predictor, head and sampler."""
    if steps < 3:
        return 0.0
    # Two computed steps less in one of them, so that a computed step need not be known.
    few = Recipe((Rule(Site("stack"), MaskTable((tuple(range(steps // 2)),), steps)),))
    fewest = Recipe((Rule(Site("stack"), MaskTable(((0,),), steps)),))
    seconds = []
    for recipe in (few, fewest):
        with api.enabled(stage.pipe, recipe):
            seconds.append(min(stage.latents(item).seconds for _ in range(2)))
    computed = (seconds[0] - seconds[1]) / (steps // 2 - 1) if steps > 3 else 0.0
    return max(0.0, (seconds[1] - fixed - computed) / (steps - 1))


def _by_kind(blocks: Blocks, block_ms: Sequence[float]) -> dict[str, float]:
    kinds: dict[str, list[float]] = defaultdict(list)
    for block, ms in zip(blocks, block_ms, strict=True):
        kinds[f"block/{type(block.module).__name__}"].append(ms)
    return {kind: statistics.median(values) for kind, values in kinds.items()}


def _seen(found: Render) -> list[float]:
    """A few numbers of what a run ends in, which tell other weights and other inputs."""
    values = final_of(found).ravel()
    listed: list[float] = values[:: max(1, values.size // _SEEN)].tolist()
    return listed


def _is_near(found: Sequence[float], known: Sequence[float]) -> bool:
    """Whether two samples are of one model: not every machine repeats itself bit for bit."""
    return len(found) == len(known) and math.dist(found, known) <= _NEAR * math.hypot(*known)


def _resumed(
    folder: Path, stage: Stage, scout: _Scout, items: Sequence[Item], seen: Sequence[float]
) -> dict[str, Any] | None:
    """The description in `folder`, if a trace of the same runs was begun there."""
    if not (folder / ABOUT).exists():
        return None
    about = read_about(folder / ABOUT)
    wanted = {
        "fingerprint": to_json(scout.mark),
        "prompts": [prompt for prompt, _ in items],
        "seeds": [seed for _, seed in items],
        "settings": plain(stage.call_kwargs),
    }
    # As JSON has it: tuples become lists there.
    wanted = json.loads(json.dumps(wanted))
    other = [key for key, value in wanted.items() if about.get(key) != value]
    if not _is_near(seen, about.get("seen", ())):
        other.append("weights or inputs")
    if other:
        raise PlanMismatchError(
            f"{folder} holds a trace of other runs (other {', '.join(other)}); "
            "give another folder or delete it"
        )
    return about
