"""A small transformer and a small U-Net for tests that write a paper's rule out by hand.

Their parts are modules with the names of the hosts' (`attn1`, `attn2`, `ff`, `norm1`), so that the
library finds them, and every module that a method may skip notes when it runs. The rule under test
runs them one by one; `walk` drives either that or the model itself through an Euler sampler and
returns what came out and what ran.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from blockcache import recipes
from toys import Scheduler

SIZE = 6  # pictures of 6 x 6
WIDTH = 16  # channels, and features of a token


class Config(dict):
    """As diffusers' configs: a dictionary whose entries are attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Noting(nn.Module):
    """Notes its name when it runs."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self._log = name, log

    def note(self) -> None:
        self._log.append(self.name)


class Attention(Noting):
    """One head; to other tokens where it is given some."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(name, log)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.note()
        others = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        scores = self.to_q(hidden_states) @ self.to_k(others).transpose(1, 2)
        return (scores / math.sqrt(WIDTH)).softmax(-1) @ self.to_v(others)


class FeedForward(Noting):
    """Two layers."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(name, log)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.note()
        return self.down(torch.tanh(self.up(hidden_states)))


class Modulated(nn.Module):
    """Scale, shift and gate from the time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shift, gate = self.linear(emb)[:, None].chunk(3, -1)
        return nn.functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift, gate


class TransformerBlock(Noting):
    """Modulated self-attention, cross-attention and MLP, each added to its input."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(name, log)
        self.norm1 = Modulated()
        self.attn1 = Attention(f"{name}.attn1", log)
        self.attn2 = Attention(f"{name}.attn2", log)
        self.ff = FeedForward(f"{name}.ff", log)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor
    ) -> torch.Tensor:
        self.note()
        normed, gate = self.norm1(hidden_states, temb)
        hidden_states = hidden_states + gate * self.attn1(normed)
        hidden_states = hidden_states + self.attn2(hidden_states, encoder_hidden_states)
        return hidden_states + gate * self.ff(hidden_states)


class Transformer(nn.Module):
    """Latents `[B, C, H, W]` to tokens, blocks, and back."""

    def __init__(self, blocks: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.log: list[str] = []
        self.config = Config(patch_size=1, in_channels=WIDTH)
        self.blocks = nn.ModuleList(TransformerBlock(str(i), self.log) for i in range(blocks))
        self.time, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def embed(self, timestep: torch.Tensor) -> torch.Tensor:
        """The time embedding `[1, WIDTH]`."""
        waves = torch.arange(1, WIDTH + 1) * timestep.reshape(1, 1) / 1000.0
        return self.time(torch.cos(waves))

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, N, C]`."""
        return latents.flatten(2).transpose(1, 2)

    def output(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the head makes of the last block's tokens, as latents."""
        return self.head(tokens).transpose(1, 2).unflatten(2, (SIZE, SIZE))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        temb, h = self.embed(timestep), self.tokens(hidden_states)
        for block in self.blocks:
            h = block(h, encoder_hidden_states=encoder_hidden_states, temb=temb)
        return self.output(h)


class Level(Noting):
    """A block of the U-Net: the sum of its inputs through a layer."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(name, log)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.note()
        if skip is not None:
            hidden_states = hidden_states + 0.5 * skip
        return torch.tanh(self.layer(hidden_states + temb[:, None]))


class Down(Level):
    """Returns its output twice: on the way down, and for the skip connection."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, temb: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inner = super().forward(hidden_states, temb)
        return inner, inner + 1.0


class UNet(nn.Module):
    """Three levels down, a middle, three levels up; block i feeds block 6 - i."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.log: list[str] = []
        self.down_blocks = nn.ModuleList(Down(str(i), self.log) for i in range(3))
        self.mid_block = Level("3", self.log)
        self.up_blocks = nn.ModuleList(Level(str(i), self.log) for i in range(4, 7))
        self.time, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    embed, tokens, output = Transformer.embed, Transformer.tokens, Transformer.output

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        temb, h = self.embed(timestep), self.tokens(hidden_states)
        skips = []
        for block in self.down_blocks:
            h, skip = block(h, temb)
            skips.append(skip)
        h = self.mid_block(h, temb)
        for block in self.up_blocks:
            h = block(h, temb, skips.pop())
        return self.output(h)


def ready_recipes() -> list[str]:
    """The recipes that need neither a trace nor anything else to be made."""
    signatures = {name: inspect.signature(recipes.function(name)) for name in recipes.names()}
    return [
        name
        for name, signature in signatures.items()
        if all(p.default is not p.empty for p in signature.parameters.values())
    ]


Denoise = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(step, timestep, latents) to the output."""


class Walk(NamedTuple):
    """outputs: the denoiser's, by step. ran: the modules that ran, by step, sorted."""

    outputs: list[torch.Tensor]
    ran: list[list[str]]

    def steps_of(self, name: str) -> list[int]:
        """The steps in which a module ran."""
        return [i for i, names in enumerate(self.ran) if name in names]


def text(seed: int = 0) -> torch.Tensor:
    """Five tokens to attend to."""
    return torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(100 + seed))


def walk(log: list[str], denoise: Denoise, scheduler: Scheduler, seed: int = 0) -> Walk:
    """An Euler run from noise to picture, the output taken as the velocity."""
    latents = torch.randn(1, WIDTH, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    outputs, ran = [], []
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            scheduler.step_index = i
            log.clear()
            outputs.append(denoise(i, timestep, latents))
            ran.append(sorted(log))
            latents = latents + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * outputs[-1]
    return Walk(outputs, ran)
