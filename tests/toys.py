"""Denoisers small enough to be worked out by hand, and a scheduler-like object to drive them.

A block computes `2 x + c` with c = 1, 2, 3, ...; four of them take x to `16 x + 26`, so their
residual is `15 x + 26`. Blocks count their calls in `calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.plan import Copy, MaskTable


class Block(nn.Module):
    """`factor * x + constant`, optionally written into its input."""

    def __init__(self, constant: float, factor: float = 2.0, in_place: bool = False) -> None:
        super().__init__()
        self.child = nn.Identity()  # a block list holds modules with children
        self.constant, self.factor, self.in_place = constant, factor, in_place
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.in_place:
            return hidden_states.mul_(self.factor).add_(self.constant)
        return self.factor * hidden_states + self.constant


class Denoiser(nn.Module):
    """A chain of blocks.

    leave_out: numbers of blocks not called now. hints: added behind every block, as a ControlNet's
    residuals are; in_place_hints: into the tensor the block returned.
    """

    def __init__(self, blocks: int = 4, in_place: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i + 1.0, in_place=in_place) for i in range(blocks))
        self.leave_out: tuple[int, ...] = ()
        self.hint: float | None = None
        self.is_hint_in_place = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        skip_layers: Sequence[int] | None = None,
    ) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            if i in self.leave_out or i in (skip_layers or ()):
                continue
            hidden_states = block(hidden_states)
            if self.hint is not None and self.is_hint_in_place:
                hidden_states += self.hint
            elif self.hint is not None:
                hidden_states = hidden_states + self.hint
        return hidden_states


class PairBlock(nn.Module):
    """Two streams: h' = 2 h + e + c, e' = e + 1 (or no e at the end)."""

    def __init__(self, constant: float, order: str, last: bool = False) -> None:
        super().__init__()
        self.child = nn.Identity()
        self.constant, self.order, self.last = constant, order, last
        self.calls = 0

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        self.calls += 1
        h = 2 * hidden_states + encoder_hidden_states + self.constant
        e = None if self.last else encoder_hidden_states + 1
        return (e, h) if self.order == "eh" else (h, e)


class Pairs(nn.Module):
    """A chain of two-stream blocks, called by position or keyword, returning (e, h) or (h, e)."""

    def __init__(
        self, order: str = "eh", keywords: bool = False, last_none: bool = False, blocks: int = 3
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PairBlock(i + 1.0, order, last_none and i == blocks - 1) for i in range(blocks)
        )
        self.order, self.keywords = order, keywords

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        h, e = hidden_states, encoder_hidden_states
        for block in self.blocks:
            if self.keywords:
                out = block(encoder_hidden_states=e, hidden_states=h)
            else:
                out = block(h, e)
            e, h = out if self.order == "eh" else out[::-1]
        return h, e


class Joined(nn.Module):
    """Two lists as in Flux: two-stream blocks, then blocks on one stream.

    joined: the model concatenates the streams in between, so nothing links the lists.
    """

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(PairBlock(i + 1.0, "eh") for i in range(2))
        if joined:
            self.singles = nn.ModuleList(Block(i + 1.0) for i in range(2))
        else:
            self.singles = nn.ModuleList(PairBlock(i + 3.0, "eh") for i in range(2))
        self.joined = joined

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.pairs, *self.singles]

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h, e = hidden_states, encoder_hidden_states
        for block in self.pairs:
            e, h = block(h, e)
        if not self.joined:
            for block in self.singles:
                e, h = block(h, e)
            return h, e
        both = torch.cat([e, h], dim=1)
        for block in self.singles:
            both = block(both)
        return both[:, e.shape[1] :], both[:, : e.shape[1]]


class Scheduler:
    """Counts its steps, as most of diffusers' schedulers do."""

    def __init__(self, steps: int = 10) -> None:
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.set_timesteps(steps)

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.linspace(1000.0, 1000.0 / steps, steps)
        self.sigmas = torch.linspace(1.0, 0.0, steps + 1)
        self.step_index = None


class SilentScheduler:
    """One without `step_index`, as DDIM's: only the timestep tells the step."""

    def __init__(self, steps: int = 10) -> None:
        self.timesteps = torch.linspace(1000.0, 1000.0 / steps, steps)


def column(value: float) -> torch.Tensor:
    """A batch of one token of one channel."""
    return torch.full((1, 1, 1), float(value))


def drive(
    model: nn.Module,
    scheduler: Any,
    inputs: Iterable[float],
    before: Callable[[int], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """One run: the model's (first) output at each step, as a number."""
    outputs = []
    with torch.no_grad():
        for i, x in enumerate(inputs):
            if hasattr(scheduler, "step_index"):
                scheduler.step_index = i
            if before is not None:
                before(i)
            out = model(column(x), timestep=scheduler.timesteps[i], **kwargs)
            outputs.append((out[0] if isinstance(out, tuple) else out).flatten()[0].item())
    return outputs


def table(*computed: int, total: int = 10) -> MaskTable:
    """A static mask that computes these steps."""
    return MaskTable((computed,), total)


def static(site: Site, *computed: int, total: int = 10, predictor: Any = None, **rule: Any) -> Rule:
    """A rule that computes these steps of `total`."""
    return Rule(site, table(*computed, total=total), predictor or Copy(), **rule)


def enable(model: nn.Module, *rules: Rule, steps: int = 10, branches: str = "joint") -> Scheduler:
    """Enable the rules on a toy; returns the scheduler that drives it."""
    scheduler = Scheduler(steps)
    blockcache.enable(model, Recipe(tuple(rules), branches), scheduler=scheduler)
    return scheduler


def calls(model: nn.Module) -> list[int]:
    """How often each block was called since the last question."""
    counts = [block.calls for block in model.blocks]
    for block in model.blocks:
        block.calls = 0
    return counts


def branches(model: nn.Module) -> list[dict[str, Any]]:
    """The branches in the model's summary."""
    return blockcache.summary(model).as_dict()["branches"]
