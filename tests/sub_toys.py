"""Denoisers whose blocks have sub-layers, in numbers that can be worked out by hand.

A block takes x to x' = x + attn(x), x'' = x' + cross(x', e), x''' = x'' + ff(x'') with

    attn(x) = x + 1        cross(x, e) = 3 x + e        ff(x) = 2 x + 3

so x''' = 24 x + 3 e + 15. Where one of them is reused from a step with x = a (and the same e):

    attn: 12 x + 12 a + 3 e + 15    cross: 6 x + 18 a + 3 e + 15    ff: 8 x + 16 a + 3 e + 15

Modules count their calls in `calls`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Attention(nn.Module):
    """`factor * x + constant`, plus the other tokens where it gets some."""

    def __init__(self, factor: float, constant: float, in_place: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Identity(), nn.Identity()
        self.factor, self.constant, self.in_place = factor, constant, in_place
        self.calls = 0

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
    ) -> Any:
        self.calls += 1
        if self.in_place:
            hidden_states = hidden_states.mul_(self.factor).add_(self.constant)
        else:
            hidden_states = self.factor * hidden_states + self.constant
        return (
            hidden_states
            if encoder_hidden_states is None
            else hidden_states + _one(encoder_hidden_states)
        )


class Joint(Attention):
    """Joint attention: two streams in, (h + e, 2 e) out."""

    def forward(self, hidden_states: Any, encoder_hidden_states: Any = None) -> Any:
        self.calls += 1
        return hidden_states + encoder_hidden_states, 2 * encoder_hidden_states


class Mlp(nn.Module):
    """`factor * x + constant`."""

    def __init__(self, factor: float, constant: float) -> None:
        super().__init__()
        self.net = nn.Identity()
        self.factor, self.constant = factor, constant
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.factor * x + self.constant


class SubBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross, self.ff = Attention(1, 1), Attention(3, 0), Mlp(2, 3)
        self.calls = 0

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        self.calls += 1
        x = hidden_states + self.attn(hidden_states.clone())
        x = x + self.cross(x, encoder_hidden_states=encoder_hidden_states)
        return x + self.ff(x)


class SubDenoiser(nn.Module):
    """A chain of `SubBlock`s; e is 0 unless given."""

    def __init__(self, blocks: int = 1, make: Any = SubBlock) -> None:
        super().__init__()
        # A list of one block is no list to the library, so there is a last one that does nothing.
        self.blocks = nn.ModuleList([*(make() for _ in range(blocks)), Nothing()])

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> Any:
        e = encoder_hidden_states
        if e is None:
            e = torch.zeros_like(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, e)
        return hidden_states


class Nothing(nn.Module):
    """A block that hands a copy of its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()
        self.calls = 0

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        self.calls += 1
        return hidden_states.clone()


def part_calls(model: nn.Module) -> dict[str, int]:
    """How often each sub-layer ran since the last question, summed over the blocks."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (Attention, Mlp)):
            kind = name.rsplit(".", 1)[-1]
            counts[kind] = counts.get(kind, 0) + module.calls
            module.calls = 0
    return counts


def _one(others: torch.Tensor) -> torch.Tensor:
    """The other tokens in the shape of one."""
    return others[:, :1]
