"""Sliding Tile Attention (2502.04507): every tile sees the tiles in a window around it.

Kept: tiles of 6 x 8 x 8 tokens, windows counted in tiles, the window's centre pushed back inside
the video so that tiles at the border see as many as others. Different: any grid (tiles at the far
edges are smaller); one window for all heads instead of windows searched per head, layer and step.
"""

import functools
from typing import ClassVar

import torch
from torch import Tensor

from blockcache.kernels.sparse_attention import SparsePlan
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Box, pack, window
from blockcache.sparse.tilings import tiles


@spec
class STA(Planner):
    """A window of tiles around each tile.

    sides: frames, height and width of the window in tiles, odd. tile: frames, height and width of
    a tile in tokens.
    """

    sides: Box = (3, 3, 3)
    tile: Box = (6, 8, 8)

    card: ClassVar[Card] = Card("2502.04507", "cubes", "none (static)", "window, pushed inside")

    def __post_init__(self) -> None:
        """A window has a centre."""
        if not all(side % 2 for side in self.sides):
            raise ValueError(f"sides are {self.sides}; a window has odd sides, in tiles")

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """The same for every call with this geometry."""
        return Decision(_plan(self, geometry.bare, q.device))


@functools.lru_cache(maxsize=16)
def _plan(planner: STA, geometry: Geometry, device: torch.device) -> SparsePlan:
    tiling = tiles(geometry, planner.tile, device)
    return pack(window(tiling, planner.sides, device, clamped=True), tiling)
