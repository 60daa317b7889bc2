"""The torch paths; they define the scores and run anywhere."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pooled(NamedTuple):
    """Block means `[B, H, n, D]`, self-similarities `[B, H, n]` or None, sizes `[B|1, H|1, n]`."""

    mean: Tensor
    similarity: Tensor | None
    sizes: Tensor


def block_offsets(blocks: int | Tensor, length: int, device: torch.device) -> Tensor:
    """int32 offsets `[B|1, H|1, n + 1]` of blocks of one size or of any."""
    if isinstance(blocks, Tensor):
        return blocks
    count = -(-length // blocks)
    starts = torch.arange(count + 1, device=device, dtype=torch.int32) * blocks
    return starts.clamp_max(length)[None, None]


def mean_pool_torch(
    x: Tensor, blocks: int | Tensor, order: Tensor | None, with_similarity: bool
) -> Pooled:
    """Block means, and the length of the mean unit vector squared, for `[B, H, S, D]`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if order is not None and order.shape[:2] == (1, 1):
        x = x.index_select(2, order[0, 0].long())
    elif order is not None:
        index = order.long().expand(*x.shape[:2], -1)[..., None].expand(-1, -1, -1, x.shape[3])
        x = x.gather(2, index)
    sizes = block_offsets(blocks, x.shape[2], x.device).diff(dim=-1)
    mean = _block_sums(x.to(wide), blocks) / sizes.clamp_min(1)[..., None]
    similarity = None
    if with_similarity:
        unit = F.normalize(x.to(wide), dim=-1, eps=1e-30)
        total = _block_sums(unit, blocks).square().sum(-1)
        similarity = torch.where(sizes > 0, total / sizes.clamp_min(1).to(wide).square(), 1.0)
    return Pooled(mean, similarity, sizes)


def _block_sums(x: Tensor, blocks: int | Tensor) -> Tensor:
    """Sum of each block's rows, `[B, H, n, D]`."""
    if isinstance(blocks, int):
        padded = F.pad(x, (0, 0, 0, -x.shape[2] % blocks))
        return padded.unflatten(2, (-1, blocks)).sum(3)
    places = torch.arange(x.shape[2], device=x.device).expand(*blocks.shape[:2], -1).contiguous()
    number = torch.searchsorted(blocks[..., 1:].contiguous(), places, right=True)
    sums = x.new_zeros((*x.shape[:2], blocks.shape[2] - 1, x.shape[3]))
    return sums.scatter_add_(2, number.expand(*x.shape[:2], -1)[..., None].expand_as(x), x)


def centroid_scores_torch(
    query_means: Tensor, key_means: Tensor, scale: float, key_sizes: Tensor | None
) -> Tensor:
    """Softmax over key blocks, weighted by their sizes if given."""
    wide = torch.promote_types(query_means.dtype, torch.float32)
    logits = (query_means.to(wide) @ key_means.to(wide).transpose(-1, -2)) * scale
    if key_sizes is not None:
        logits = logits + key_sizes.to(wide).log()[..., None, :]
    return logits.softmax(-1)


def antidiagonal_scores_torch(
    query: Tensor, key: Tensor, stride: int, block_q: int, block_k: int, scale: float
) -> Tensor:
    """Two cells' logit is the mean over their antidiagonal; a head at a time, `[B, H, S, D]`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q_rows, q_part = _cells(query.shape[2], stride, query.device)
    k_rows, k_part = _cells(key.shape[2], stride, query.device)
    heads = []
    for h in range(query.shape[1]):
        # Queries run backwards, keys forwards: [B, cells, stride * D]
        q = query[:, h, q_rows.flip(-1)].flatten(2).to(wide)
        k = key[:, h, k_rows].flatten(2).to(wide)
        logits = (q @ k.transpose(1, 2)) * (scale / stride) + k_part.to(wide).log()
        cells = logits.softmax(-1) * q_part.to(wide)[:, None]
        cells = F.pad(
            cells,
            (0, -cells.shape[2] % (block_k // stride), 0, -cells.shape[1] % (block_q // stride)),
        )
        cells = cells.unflatten(2, (-1, block_k // stride)).sum(3)
        heads.append(cells.unflatten(1, (-1, block_q // stride)).sum(2))
    return torch.stack(heads, 1)


def _cells(length: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of each cell `[n, stride]`, the last one repeated, and real shares `[n]`."""
    count = -(-length // stride)
    tokens = torch.arange(count * stride, device=device).view(count, stride)
    return tokens.clamp_max(length - 1), (tokens < length).sum(1) / stride


def block_mass_torch(
    query: Tensor, key: Tensor, lse: Tensor, block_q: int, block_k: int, row_step: int, scale: float
) -> Tensor:
    """Sum of probabilities per block pair, one head and some rows at a time, `[B, H, S, D]`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, _ = query.shape
    n_q, n_k = -(-length // block_q), -(-key.shape[2] // block_k)
    mass = query.new_empty((batch, heads, n_q, n_k), dtype=wide)
    # One room for all rows: new memory for each would cost more than the products in it.
    room = query.new_empty((batch, -(-block_q // row_step), n_k * block_k), dtype=wide)
    for h in range(heads):
        keys = key[:, h].to(wide).transpose(1, 2)
        for i in range(n_q):
            rows = slice(i * block_q, (i + 1) * block_q, row_step)
            q, known = query[:, h, rows].to(wide), lse[:, h, rows, None].to(wide)
            # Beyond the last key there is nothing.
            weights = room[:, : q.shape[1]]
            weights[:, :, key.shape[2] :] = 0
            inside = weights[:, :, : key.shape[2]]
            torch.baddbmm(known, q, keys, beta=-1, alpha=scale, out=inside).exp_()
            held = min(block_q, length - i * block_q)
            torch.sum(weights.unflatten(2, (n_k, block_k)), (1, 3), out=mass[:, h, i])
            mass[:, h, i] *= held / q.shape[1]
    return mass
