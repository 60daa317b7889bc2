"""What all contenders start from: the model, the prompts, and a pipeline of their own each."""

import contextlib
import copy
import io
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import blockcache
from blockcache.pipelines.models import Model
from blockcache.plan.trace import Trace
from blockcache.tuning.stage import Item, Render, Stage

PEERS, FEWER, OURS = "peer caches", "fewer steps", "blockcache"
SIDES = (PEERS, FEWER, OURS)

# The held-out prompts in one random order: the first ones choose settings, calibrate and tune,
# those after them are raced on, with seeds that nothing else uses.
_PROMPT_SEED, _SPARE, _SWEEP, _CALIBRATION = 31, 20, 4, 8
_FIRST_SEED = 9000


class Impossible(Exception):
    """A contender that this model has no use for; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One setting of one method.

    side: one of SIDES. family: its method, one line in the plot. setting: values of its knobs.
    enter: makes its lane; raises where it cannot run. mark: tells apart contenders of one name.
    """

    side: str
    family: str
    setting: str
    enter: Callable[["Ground"], "Lane"]
    mark: str = ""

    @property
    def key(self) -> str:
        """What its measurements are kept under."""
        return " | ".join(filter(None, (self.family, self.setting, self.mark)))


@dataclass(frozen=True, eq=False)
class Lane:
    """A contender ready to render. within: makes the context that it renders in."""

    stage: Stage
    steps: int | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext

    def render(self, item: Item) -> Render:
        """One picture, timed from the call to floats on the host."""
        with self.within():
            return self.stage.render(item, self.steps)

    def multiplications(self, item: Item) -> int:
        """What the transformer's linear layers multiply in one run: the work that was not saved."""
        with counted(self.stage.pipe.transformer) as work:
            self.render(item)
        return work["multiplications"]


class Ground:
    """The model as every contender finds it.

    changed: arguments of the call that are not the model's own, such as its size.
    race, sweep, calibration, tuning: items (prompt and seed), all of prompts that no training has
    seen. The race has no prompt and no seed in common with the others.
    """

    def __init__(
        self, model: Model, pipe: Any, steps: int, changed: dict[str, int], prompts: int
    ) -> None:
        self.model, self.steps, self.changed = model, steps, changed
        # A copy that never runs: whatever a run leaves behind is in none of the contenders.
        self._unused = own(pipe)
        self.call = {**model.call, **changed, "num_inference_steps": steps}
        self.plain = Lane(Stage(pipe, self.call, "peers"))
        held_out = _world(model.name)(_SPARE + prompts, _PROMPT_SEED)
        items: list[Item] = [(prompt, _FIRST_SEED + i) for i, prompt in enumerate(held_out)]
        self.tuning, self.race = items[:_SPARE], items[_SPARE:]
        self.sweep, self.calibration = items[:_SWEEP], items[_SWEEP : _SWEEP + _CALIBRATION]

    @property
    def pipeline(self) -> str:
        """Class name of the pipeline."""
        return type(self._unused).__name__

    def fresh(self) -> Any:
        """A pipeline of one's own; only the weights are shared."""
        return own(self._unused)

    def lane(self, pipe: Any, steps: int | None = None) -> Lane:
        """A lane for a pipeline made ready."""
        return Lane(Stage(pipe, self.call, "peers"), steps)

    @cached_property
    def levels(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The sampler's sigmas (with the final one) and timesteps."""
        self.plain.render(self.calibration[0])
        timesteps = torch.as_tensor(self.plain.stage.pipe.scheduler.timesteps).clone()
        return self.plain.stage.sigmas(), timesteps

    @cached_property
    def trace(self) -> Trace:
        """For our calibrated recipes."""
        prompts, seeds = zip(*self.calibration, strict=True)
        return blockcache.trace(self.fresh(), list(prompts), seeds=list(seeds), **self.call)

    @cached_property
    def magnitudes(self) -> list[float]:
        """MagCache's ratios, by its own calibration: means over prompts and branches."""
        from diffusers.hooks import MagCacheConfig

        found: list[list[float]] = []
        for item in self.calibration:
            pipe, printed = self.fresh(), io.StringIO()
            config = MagCacheConfig(calibrate=True, num_inference_steps=self.steps)
            pipe.transformer.enable_cache(config)
            # It prints its findings, and has no other way to tell them.
            with contextlib.redirect_stdout(printed):
                self.lane(pipe).render(item)
            lines = printed.getvalue().splitlines()
            found += [json.loads(line) for line in lines if line.startswith(("[0", "[1"))]
        if not found or {len(row) for row in found} != {self.steps}:
            raise Impossible("its calibration gave no ratios for these steps")
        return [statistics.fmean(column) for column in zip(*found, strict=True)]


def own(pipe: Any) -> Any:
    """A pipeline with a class, a transformer and a sampler of its own.

    Peers keep state on all three, so that two of them in one process would disturb each other.
    Weights are shared: copies cost no memory.
    """
    kind = type(pipe)
    made = copy.copy(pipe)
    # Adapters are found by the name of the class.
    made.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__})
    tensors = (*pipe.transformer.parameters(), *pipe.transformer.buffers())
    made.transformer = copy.deepcopy(pipe.transformer, {id(tensor): tensor for tensor in tensors})
    made.scheduler = copy.deepcopy(pipe.scheduler)
    return made


@contextlib.contextmanager
def counted(transformer: torch.nn.Module) -> Iterator[Mapping[str, int]]:
    """Counts what the linear layers multiply inside a `with` block."""
    work = {"multiplications": 0}

    def note(layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        work["multiplications"] += arguments[0].numel() * int(layer.out_features)

    layers = [m for m in transformer.modules() if isinstance(m, torch.nn.Linear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def _world(model: str) -> Callable[[int, int], list[str]]:
    """Gives held-out prompts of an embedded model."""
    if model == "tiny-image":
        from blockcache.pipelines.embedded.world import held_out_prompts
    elif model == "tiny-video":
        from blockcache.pipelines.embedded.world_video import held_out_prompts
    else:
        raise Impossible(f"no held-out prompts for {model}; race tiny-image or tiny-video")
    return held_out_prompts
