"""Tilings: in which order the video's tokens stand and where that order is cut into blocks.

Every tiling is a bijection. Positions are already in q and k when a planner sees them, so reading
tokens in another order changes which tokens share a block and nothing else.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from blockcache.plan.geometry import Geometry

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Tiling:
    """Tokens in blocks, shared by all heads.

    order: int32 `[1, 1, S]`, the token at each place; None for frame-major order. blocks: tokens
    per block, or int32 offsets `[1, 1, n + 1]`. grid: blocks along frames, height and width for
    tiles in space, frames first; `(n, 1, 1)` for cuts of a line.
    """

    order: Tensor | None
    blocks: int | Tensor
    grid: Shape

    @property
    def count(self) -> int:
        """Number of blocks."""
        return math.prod(self.grid)

    def coordinates(self, device: torch.device) -> Tensor:
        """Place of each block in the grid of blocks, int64 `[n, 3]`."""
        return torch.cartesian_prod(*(torch.arange(n, device=device) for n in self.grid))


def frame_major(geometry: Geometry, block: int) -> Tiling:
    """The order as it is, cut every `block` tokens."""
    return Tiling(None, block, (-(-geometry.video // block), 1, 1))


def token_major(geometry: Geometry, block: int, device: torch.device) -> Tiling:
    """Each place of the frame through all frames, then the next: bands in time become contiguous.

    Sparse-VideoGen (2502.01776) lays its temporal heads out like this.
    """
    order = token_major_order(geometry, device)
    return Tiling(order, block, (-(-geometry.video // block), 1, 1))


def token_major_order(geometry: Geometry, device: torch.device) -> Tensor:
    """The order of `token_major`, int32 `[1, 1, S]`."""
    tokens = torch.arange(geometry.video, dtype=torch.int32, device=device)
    return tokens.view(geometry.frames, geometry.frame).T.reshape(1, 1, -1)


def tiles(geometry: Geometry, shape: Shape, device: torch.device) -> Tiling:
    """Boxes of `shape` (frames, height, width), one behind the other, each one block.

    Boxes at the far edges of a grid that is not divisible are smaller. Patches of a frame are boxes
    of 1 frame, chunks in time are boxes of the whole frame.
    """
    return _tiles(geometry.grid, shape, device)


@functools.lru_cache(maxsize=64)
def _tiles(sizes: Shape, shape: Shape, device: torch.device) -> Tiling:
    frames, rows, columns = (-(-size // side) for size, side in zip(sizes, shape, strict=True))
    # The box of each token along each axis, joined to one number.
    t, h, w = torch.meshgrid(
        *(torch.arange(n, device=device) // side for n, side in zip(sizes, shape, strict=True)),
        indexing="ij",
    )
    box = ((t * rows + h) * columns + w).flatten()
    order = box.argsort(stable=True).to(torch.int32)[None, None]
    whole = all(size % side == 0 for size, side in zip(sizes, shape, strict=True))
    volume = math.prod(shape)
    if whole and volume >= 16 and volume & (volume - 1) == 0:
        return Tiling(order, volume, (frames, rows, columns))
    held = torch.bincount(box, minlength=frames * rows * columns)
    offsets = torch.nn.functional.pad(held.cumsum(0), (1, 0)).to(torch.int32)[None, None]
    return Tiling(order, offsets, (frames, rows, columns))
