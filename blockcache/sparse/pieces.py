"""What several planners share: kinds of parameters, and the steps from tokens to a plan."""

import math
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from blockcache.kernels.block_scores import centroid_scores, mean_pool
from blockcache.kernels.sparse_attention import SparsePlan
from blockcache.sparse.tilings import Tiling


def power_of_two(value: int) -> int:
    """A block size the kernels take, for fields of specs."""
    if value < 16 or value & (value - 1):
        raise ValueError(f"a block has {value} tokens; it must be a power of two of at least 16")
    return value


Block = Annotated[int, AfterValidator(power_of_two)]
"""Tokens per block."""
Share = Annotated[float, Field(gt=0, le=1)]
"""A share of blocks or of attention mass; 1 keeps all."""
Positive = Annotated[int, Field(ge=1, le=10**6)]
Box = tuple[Positive, Positive, Positive]
"""Frames, height, width."""


def block_means(x: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Mean of each block, fp32 `[B, H, n, D]`, and its tokens `[1, 1, n]`."""
    pooled = mean_pool(x, tiling.blocks, order=tiling.order, layout="BHSD")
    return pooled.mean, pooled.sizes


def mean_scores(q: Tensor, k: Tensor, tiling: Tiling, scale: float | None) -> Tensor:
    """Softmax between block means, fp32 `[B, H, n, n]`; a smaller block weighs less."""
    queries, _ = block_means(q, tiling)
    keys, sizes = block_means(k, tiling)
    return centroid_scores(queries, keys, scale=scale, key_sizes=sizes)


def pack(mask: Tensor, q_tiling: Tiling, k_tiling: Tiling | None = None) -> SparsePlan:
    """The plan that attends `mask`, `[B|1, H|1, nQ, nK]`."""
    k_tiling = k_tiling or q_tiling
    return SparsePlan.from_mask(
        mask, q_tiling.blocks, k_tiling.blocks, q_tiling.order, k_tiling.order
    )


def count_for(density: float, blocks: int) -> int:
    """A share of the blocks as a number, rounded up, at least 1."""
    # 0.07 * 100 is 7.000000000000001.
    return max(1, math.ceil(density * blocks - 1e-9))


def share_for(scores: Tensor, density: float, rows: int = 64) -> Tensor:
    """The share of mass at which rule A keeps `density` of all blocks, fp32 `[B, 1]`.

    One share for all heads: those whose attention is spread out get more blocks, those that look at
    little get fewer, and the total does not depend on the content. It is the `density` quantile of
    the mass that stands before each block in its row's ranking, over at most `rows` rows of each
    head, found without a host read.

    Args:
        scores: Masses `[B, H, nQ, nK]`.
        density: Kept share of the blocks, above 0 and below 1.
        rows: Rows of each head to look at.
    """
    step = -(-scores.shape[2] // rows)
    ranked = scores[:, :, ::step].sort(-1, descending=True).values
    behind = ranked.cumsum(-1)
    before = ((behind - ranked) / behind[..., -1:]).flatten(1)
    # Between the last that is kept and the first that is not, so that rounding moves neither.
    size = before.shape[1]
    kept = max(1, int(density * size))
    edges = [before.kthvalue(min(n, size), -1, keepdim=True).values for n in (kept, kept + 1)]
    return ((edges[0] + edges[1]) / 2).clamp(1e-12, 1.0)


def window(tiling: Tiling, sides: Box, device: torch.device, clamped: bool) -> Tensor:
    """Which tiles lie in a box of `sides` tiles around each tile, bool `[1, 1, n, n]`.

    clamped: push the box back inside the grid, so that a tile at the edge sees as many tiles as
    any; otherwise the box is cut off there.
    """
    places = tiling.coordinates(device)
    reach = torch.tensor([side // 2 for side in sides], device=device)
    centres = places
    if clamped:
        last = torch.tensor(tiling.grid, device=device) - 1
        centres = torch.maximum(torch.minimum(places, last - reach), reach)
    apart = (centres[:, None] - places[None]).abs()
    return (apart <= reach).all(-1)[None, None]


def bits_bytes(heads: int, q_blocks: int, k_blocks: int) -> int:
    """Bytes of a plan's mask for `heads` heads, all batch entries counted."""
    return heads * q_blocks * math.ceil(k_blocks / 32) * 4
