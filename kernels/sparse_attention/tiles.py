"""From a plan's blocks to the tiles that the kernel walks, without a host read."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .plan import Blocks, SparsePlan


@dataclass(frozen=True)
class QueryTiles:
    """Query tiles: `count` of them per head, none crossing a block.

    For blocks of one size tile `i` starts at `i * size` and belongs to block `i // per_block`. For
    other blocks `start`, `end` and `block` are int32 `[B|1, H|1, count]`; a surplus tile has
    `start == end`.
    """

    blocks: Blocks | None
    length: int
    rows: int
    count: int = 0
    per_block: int = 1
    start: Tensor | None = None
    end: Tensor | None = None
    block: Tensor | None = None

    @classmethod
    def of(cls, plan: SparsePlan | None, length: int) -> "QueryTiles":
        """The plan's query blocks, not yet cut; no plan is one block."""
        blocks = None if plan is None else plan.q_blocks
        return cls(blocks, length, _typical_rows(blocks, length))

    def cut(self, size: int) -> "QueryTiles":
        """Cut into tiles of `size` rows."""
        if isinstance(self.blocks, Tensor):
            block, start, end = cut_ragged(self.blocks, size, self.length)
            return replace(self, count=start.shape[-1], start=start, end=end, block=block)
        per_block = 1 if self.blocks is None else self.blocks // size
        return replace(self, count=-(-self.length // size), per_block=per_block)


@dataclass(frozen=True)
class KeyTiles:
    """Key tiles, none crossing a block.

    Blocks of one size are walked as `per_block` tiles each. For others `start`, `end` and `block`
    are int32 `[B|1, H|1, n]`; a surplus tile has `start == end`.
    """

    blocks: Blocks | None
    length: int
    rows: int
    per_block: int = 1
    start: Tensor | None = None
    end: Tensor | None = None
    block: Tensor | None = None

    @classmethod
    def of(cls, plan: SparsePlan | None, length: int) -> "KeyTiles":
        """The plan's key blocks, not yet cut; no plan is a dense run."""
        blocks = None if plan is None else plan.k_blocks
        return cls(blocks, length, _typical_rows(blocks, length))

    def cut(self, size: int) -> "KeyTiles":
        """Cut into tiles of `size` rows."""
        if isinstance(self.blocks, Tensor):
            block, start, end = cut_ragged(self.blocks, size, self.length)
            return replace(self, start=start, end=end, block=block)
        return self if self.blocks is None else replace(self, per_block=self.blocks // size)


def cut_ragged(offsets: Tensor, size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut blocks of any lengths into tiles of at most `size` rows.

    Args:
        offsets: int32 `[B|1, H|1, n + 1]`, from 0 to `length`.
        size: Most rows in a tile.
        length: Rows in the sequence.

    Returns:
        Block, first row and end row of each tile, int32 `[B|1, H|1, ceil(length / size) + n]`.
        That many tiles always suffice; the surplus belongs to block 0 and is empty.
    """
    count = offsets.shape[-1] - 1
    tiles = torch.arange(-(-length // size) + count, device=offsets.device)
    lengths = offsets.diff(dim=-1)
    behind = ((lengths + (size - 1)) // size).cumsum(-1)
    tiles = tiles.expand(*offsets.shape[:2], -1).contiguous()
    block = torch.searchsorted(behind, tiles, right=True)
    real = block < count
    block = block.where(real, 0)
    within = tiles - torch.nn.functional.pad(behind, (1, 0)).gather(-1, block)
    start = offsets.gather(-1, block) + within * size
    end = torch.minimum(start + size, offsets.gather(-1, block + 1))
    nothing = torch.zeros_like(start)
    start, end = start.where(real, nothing), end.where(real, nothing)
    return block.to(torch.int32), start.to(torch.int32), end.to(torch.int32)


def _typical_rows(blocks: Blocks | None, length: int) -> int:
    """Rows in a block: exact for one size, else the power of two below the mean, at least 16."""
    if blocks is None:
        return 128
    if not isinstance(blocks, Tensor):
        return blocks
    mean = max(1, length // max(1, blocks.shape[-1] - 1))
    return max(16, 1 << (mean.bit_length() - 1))
