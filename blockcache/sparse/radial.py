"""Radial attention (2506.19852): the farther apart two frames, the narrower the band between them.

Kept: the band of every pair of frames, halving with each doubling of the distance, thinned out
where it would be narrower than a block; the first frame's keys for everyone; the shrinking of
tokens to blocks, which keeps a block if more than 60 % of its columns that are touched at all are
touched by more than a third of its rows. Different: counted in closed form, without token masks,
for any grid and cached per geometry; a short last block is judged by the rows it has, and the
diagonal is always kept, so that no query is left without keys (the paper's lengths are multiples of
128); no fine-tuning for longer videos.
"""

import functools
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from blockcache.kernels.sparse_attention import SparsePlan
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Block, pack
from blockcache.sparse.tilings import frame_major


@spec
class Radial(Planner):
    """A static mask of `O(S log S)` tokens.

    decay: width of the bands, published 0.2 (Wan 2.1), 0.8 (Wan 2.2), 0.95 (HunyuanVideo); larger
    is denser. sink: let everyone attend the first frame. block: tokens per block, and half the
    narrowest band.
    """

    decay: Annotated[float, Field(gt=0, le=4)] = 0.8
    sink: bool = True
    block: Block = 128

    card: ClassVar[Card] = Card(
        "2506.19852", "frame-major", "none (static)", "distance of frames", "first frame"
    )

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """The same for every call with this geometry."""
        return Decision(_plan(self, geometry.bare, q.device))

    def describe(self) -> Card:
        """With or without the first frame."""
        return self.card if self.sink else self.card._replace(force="none")

    def reach(self, distance: int, frame: int) -> float | None:
        """Half the width of the band between frames `distance` apart; None for no band at all."""
        base = 2.0 ** frame.bit_length() / 2.0 ** distance.bit_length()
        if base < self.block and distance % int(self.block / base):
            return None
        return frame if distance <= 1 else max(self.block, base * self.decay)


@functools.lru_cache(maxsize=16)
def _plan(planner: Radial, geometry: Geometry, device: torch.device) -> SparsePlan:
    size, frame = planner.block, geometry.frame
    tiling = frame_major(geometry, size)
    mask = torch.eye(tiling.count, dtype=torch.bool)
    for i in range(geometry.frames):
        row = i * frame // size
        # Only the video's last block may be short.
        last = min(size, geometry.video - (((i + 1) * frame - 1) // size) * size)
        for j in range(geometry.frames):
            reach = planner.reach(abs(i - j), frame)
            if planner.sink and j == 0:
                reach = frame
            if reach is None:
                continue
            part = _shrunk(reach, frame, i * frame % size, j * frame % size, size, last)
            column = j * frame // size
            mask[row : row + part.shape[0], column : column + part.shape[1]] |= part
    return pack(mask[None, None].to(device), tiling)


@functools.lru_cache(maxsize=4096)
def _shrunk(reach: float, frame: int, row: int, column: int, size: int, last: int) -> Tensor:
    """Blocks of a band `|row - column| <= reach` between two frames, bool `[rows, columns]`.

    row, column: where in a block the two frames begin. last: rows that the last block has.
    """
    first = torch.arange(-(-(row + frame) // size)) * size - row
    columns = torch.arange(frame)
    top = torch.maximum(first.clamp_min(0)[:, None], (columns - reach).ceil())
    bottom = torch.minimum((first + size).clamp_max(frame)[:, None], (columns + reach).floor() + 1)
    touched = (bottom - top).clamp_min(0) / size
    touched[-1] *= size / last
    behind = -(column + frame) % size
    touched = torch.nn.functional.pad(touched, (column, behind)).unflatten(1, (-1, size))
    dense, any_ = (touched > 1 / 3).sum(-1), (touched > 0).sum(-1)
    kept: Tensor = dense > 0.6 * any_
    return kept
