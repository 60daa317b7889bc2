"""Corrections of reused payloads: a scale and a shift per channel (Block Caching, 2312.03209).

Two ways to get them for a static recipe. `scale_shift` fits them in closed form: over uncached runs
it regresses every true payload on the one that would have been reused. `distilled` is the paper's:
the cached pipeline runs from noise, at every reused step the uncached model is asked about the same
latents, and one linear layer on the time embedding per reused payload learns to close the gap,
with the model itself frozen. Both end as a table in the recipe, so that neither costs a layer.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from blockcache import api
from blockcache.engine import signals
from blockcache.engine.blocks import find_blocks
from blockcache.engine.branch import Anchor, Branch, Unit
from blockcache.engine.hooks import Call, attached
from blockcache.engine.parts import Cell
from blockcache.engine.run import Forward, Run
from blockcache.engine.runner import Runner
from blockcache.engine.stats import BranchStats
from blockcache.engine.wiring import Values, mapped
from blockcache.errors import PlanError
from blockcache.plan import ChannelTable, Copy, Recipe, Rule, ScaleShift, Step
from blockcache.tuning.stage import Stage, items_of
from blockcache.tuning.trace import only_denoiser

logger = logging.getLogger("blockcache")

Key: TypeAlias = tuple[int, int, str]
"""Rule, row of the unit, stream."""

_EMBEDDING = 64
_PULL = 1e-3
"""Towards a plain copy, as a share of the payload's own variance."""


def scale_shift(
    pipe: Any,
    prompts: Sequence[str],
    recipe: Recipe,
    seeds: Sequence[int] | None = None,
    **call_kwargs: Any,
) -> Recipe:
    """`recipe` with a least-squares scale and shift per channel for everything it reuses.

    Costs one uncached run per prompt. The pipeline is left disabled.

    Args:
        pipe: A pipeline with one denoiser.
        prompts: Calibration prompts, 4 to 8 of varied content.
        recipe: A static recipe whose rules copy.
        seeds: One per prompt; 0, 1, ... if None.
        call_kwargs: Passed to every pipeline call.

    Raises:
        BlockCacheError: no prompts, impossible arguments, or an unsupported model.
        PlanError: a recipe that is not static or does not copy.
    """
    _check(recipe)
    stage = Stage(pipe, call_kwargs, "scale_shift")
    moments = _Moments(_bare_denoiser(pipe), recipe)
    with attached(moments):
        for item in items_of(prompts, seeds):
            stage.latents(item)
    return _corrected(recipe, moments.tables())


def distilled(
    pipe: Any,
    prompts: Sequence[str],
    recipe: Recipe,
    rounds: int = 8,
    rate: float = 3e-3,
    on_progress: Callable[[int, int, float], None] | None = None,
    **call_kwargs: Any,
) -> Recipe:
    """`recipe` with scales and shifts learnt from the uncached model along the cached runs.

    Costs about four uncached runs per prompt and round, and the memory of one backward pass. The
    pipeline is left disabled and its weights untouched.

    Args:
        pipe: A pipeline with one denoiser.
        prompts: Training prompts; every round uses each once with a new seed.
        recipe: A static recipe whose rules copy.
        rounds: Passes over the prompts.
        rate: Adam's learning rate at the start; it falls to zero as a cosine.
        on_progress: Called with (runs done, runs in all, mean loss of the run).
        call_kwargs: Passed to every pipeline call.

    Raises:
        BlockCacheError: no prompts, impossible arguments, or an unsupported model.
        PlanError: a recipe that is not static or does not copy, or reuses nothing.
    """
    _check(recipe)
    stage = Stage(pipe, call_kwargs, "distilled")
    items = items_of(prompts, None)
    student = _Student(_bare_denoiser(pipe), recipe)
    runs = rounds * len(items)
    report = on_progress or (lambda done, total, loss: None)
    with attached(student), _frozen(student.denoiser):
        for run in range(runs):
            prompt, _ = items[run % len(items)]
            stage.latents((prompt, run))
            share = (1.0 + np.cos(np.pi * run / runs)) / 2.0
            report(run + 1, runs, student.learn(rate * float(share)))
    return _corrected(recipe, student.tables())


def _check(recipe: Recipe) -> None:
    if not recipe.is_static():
        raise PlanError(f"recipe {recipe.name!r} decides online; corrections need a static one")
    for rule in recipe.rules:
        if not isinstance(rule.predictor, (Copy, ScaleShift)):
            kind = type(rule.predictor).__name__
            raise PlanError(f"corrections are for recipes that copy, found the predictor {kind}")


def _bare_denoiser(pipe: Any) -> nn.Module:
    api.disable(pipe)
    return only_denoiser(pipe)


@contextmanager
def _frozen(denoiser: nn.Module) -> Iterator[None]:
    trained = [weights for weights in denoiser.parameters() if weights.requires_grad]
    denoiser.requires_grad_(False)
    try:
        yield
    finally:
        for weights in trained:
            weights.requires_grad_(True)


def _corrected(recipe: Recipe, tables: dict[Key, np.ndarray[Any, Any]]) -> Recipe:
    """The recipe with `[steps, 2, channels]` per unit and stream written into its predictors."""
    if not tables:
        raise PlanError(f"recipe {recipe.name!r} reuses nothing in these runs")
    rules = []
    for number, rule in enumerate(recipe.rules):
        own = {key: table for key, table in tables.items() if key[0] == number}
        rules.append(_with_tables(rule, own) if own else rule)
    return Recipe(tuple(rules), recipe.branches, f"{recipe.name} corrected")


def _with_tables(rule: Rule, tables: dict[Key, np.ndarray[Any, Any]]) -> Rule:
    rows = 1 + max(row for _, row, _ in tables)
    made = []
    # A U-Net's blocks differ in width: one table for each width of a stream.
    for stream, width in sorted({(key[2], table.shape[2]) for key, table in tables.items()}):
        steps = next(iter(tables.values())).shape[0]
        values = np.zeros((rows, steps, 2, width), dtype=np.float32)
        values[:, :, 0] = 1.0
        for (_, row, name), table in tables.items():
            if (name, table.shape[2]) == (stream, width):
                values[row] = table
        made.append(ChannelTable.of(stream, values))
    return replace(rule, predictor=ScaleShift(tuple(made)))


class _Moments(Runner):
    """Computes everything; gathers how true payloads depend on those that would be reused."""

    def __init__(self, denoiser: nn.Module, recipe: Recipe) -> None:
        super().__init__(denoiser, find_blocks(denoiser), recipe)
        api.check_sites(recipe, self.blocks)
        self._sums: dict[tuple[Key, int], torch.Tensor] = {}
        self._total = 0

    def _choose(self, run: Run, forward: Forward) -> None:
        forward.roles = forward.branch.roles(frozenset())

    def _finish(self, run: Run, is_complete: bool = False) -> None:
        """Nothing is reused on purpose: nothing to remark on."""

    def _store(self, forward: Forward, unit: Unit, output: Any) -> Any:
        entered = forward.inputs.pop(unit, None)
        if entered is not None:
            payload = forward.branch.payload(unit, entered, output)
            if self._is_anchor(unit, forward.step):
                unit.history.appendleft(Anchor(forward.step, payload))
            else:
                self._gather(unit, forward.step, unit.history[0].payload, payload)
        return output

    def _store_cell(
        self, forward: Forward, cell: Cell, entered: torch.Tensor | None, output: Any
    ) -> None:
        payload = cell.values(self.recipe.rules[cell.rule], entered, output)
        if self._is_anchor(cell, forward.step):
            cell.history.appendleft((forward.step, payload))
        else:
            self._gather(cell, forward.step, cell.history[0][1], payload)

    def _is_anchor(self, part: Unit | Cell, step: Step) -> bool:
        run: Run = self._local.run
        self._total = step.total
        return not part.history or bool(self._schedule(run, part)[part.row][step.index])

    def _gather(self, part: Unit | Cell, step: Step, cached: Values, true: Values) -> None:
        for name, payload in true.items():
            x, y = (t.reshape(-1, t.shape[-1]).double() for t in (cached[name], payload))
            count = torch.full_like(x[0], len(x))
            sums = torch.stack([count, x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)]).cpu()
            key = ((part.rule, part.row, name), step.index)
            self._sums[key] = self._sums.get(key, torch.zeros_like(sums)) + sums

    def tables(self) -> dict[Key, np.ndarray[Any, Any]]:
        """`[steps, 2, channels]` by unit and stream."""
        made: dict[Key, np.ndarray[Any, Any]] = {}
        for (key, step), sums in self._sums.items():
            count, x, y, xx, xy = sums.numpy()
            if key not in made:
                made[key] = np.stack([np.ones_like(x), np.zeros_like(x)])[None].repeat(
                    self._total, 0
                )
            variance, covariance = xx / count - (x / count) ** 2, xy / count - x * y / count**2
            pull = _PULL * xx / count + 1e-12
            scale = (covariance + pull) / (variance + pull)
            made[key][step] = scale, y / count - scale * x / count
        return made


class _Student(Runner):
    """Runs with the cache and learns, at every reused step, from the uncached model."""

    def __init__(self, denoiser: nn.Module, recipe: Recipe) -> None:
        super().__init__(denoiser, find_blocks(denoiser), recipe)
        api.check_sites(recipe, self.blocks)
        self.layers: dict[Key, nn.Linear] = {}
        self._steps: tuple[Step, ...] = ()
        self._losses: list[float] = []
        self._optimizer: torch.optim.Adam | None = None

    def layer(self, key: Key, like: torch.Tensor) -> nn.Linear:
        """The layer of a unit's stream; at first it copies."""
        if key not in self.layers:
            layer = nn.Linear(_EMBEDDING, 2 * like.shape[-1], device=like.device)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            self.layers[key] = layer
            if self._optimizer is not None:
                self._optimizer.add_param_group({"params": list(layer.parameters())})
        return self.layers[key]

    def learn(self, rate: float) -> float:
        """One step of the optimizer on the gradients of the last run; its mean loss."""
        if not self.layers:
            raise PlanError(f"recipe {self.recipe.name!r} reuses nothing in these runs")
        if self._optimizer is None:
            weights = [p for layer in self.layers.values() for p in layer.parameters()]
            self._optimizer = torch.optim.Adam(weights)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss = float(np.mean(self._losses))
        self._losses = []
        return loss

    def tables(self) -> dict[Key, np.ndarray[Any, Any]]:
        """The layers' scales and shifts at the steps of the runs, `[steps, 2, channels]`."""
        made = {}
        for key, layer in self.layers.items():
            with torch.no_grad():
                rows = [layer(time_embedding(step).to(layer.weight)) for step in self._steps]
            values = torch.stack(rows).unflatten(1, (2, -1)).cpu().numpy()
            values[:, 0] += 1.0
            made[key] = values
        return made

    def _new_branch(self, stats: BranchStats) -> Branch:
        branch = _LiveBranch(self.recipe, self.blocks, stats)
        branch.student = self
        return branch

    def _called(
        self, forward: Forward | None, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if forward is None or not (forward.reused or forward.cells):
            return super()._called(forward, inner, args, kwargs)
        run: Run = self._local.run
        self._steps = run.steps
        self._local.forward = None
        teacher = signals.main_tensor(inner(*args, **kwargs))
        self._local.forward = forward
        with torch.enable_grad():
            output = super()._called(forward, inner, args, kwargs)
            student = signals.main_tensor(output)
            if student is not None and teacher is not None:
                loss = (student.float() - teacher.float()).square().mean()
                loss.backward()
                self._losses.append(float(loss.detach()))
        return mapped(output, torch.Tensor.detach)

    def _store(self, forward: Forward, unit: Unit, output: Any) -> Any:
        entered = forward.inputs.get(unit)
        if entered is not None:
            forward.inputs[unit] = {name: x.detach() for name, x in entered.items()}
        with torch.no_grad():
            super()._store(forward, unit, mapped(output, torch.Tensor.detach))
        return output

    def _store_cell(
        self, forward: Forward, cell: Cell, entered: torch.Tensor | None, output: Any
    ) -> None:
        entered = None if entered is None else entered.detach()
        with torch.no_grad():
            super()._store_cell(forward, cell, entered, mapped(output, torch.Tensor.detach))


class _LiveBranch(Branch):
    """A branch whose scales and shifts are still being learnt."""

    student: _Student

    def affine(
        self, rule: Rule, unit: Unit | Cell, name: str, at: Step, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """From the layer, with gradient."""
        layer = self.student.layer((unit.rule, unit.row, name), like)
        scale, shift = layer(time_embedding(at).to(layer.weight)).unflatten(0, (2, -1))
        return 1.0 + scale, shift


def time_embedding(step: Step) -> torch.Tensor:
    """Sinusoidal embedding `[64]` of the timestep, of about unit length."""
    from diffusers.models.embeddings import get_timestep_embedding

    time = torch.tensor([1000.0 * step.noise_time])
    embedding: torch.Tensor = get_timestep_embedding(time, _EMBEDDING)[0]
    return embedding / math.sqrt(_EMBEDDING / 2)
