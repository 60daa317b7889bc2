"""The definition: softmax over a token mask, every pair written out. For tests and small inputs."""

import torch
from torch import Tensor

from .plan import Blocks, Centroids, SparsePlan, merge_states


def sparse_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SparsePlan,
    scale: float,
    initial: tuple[Tensor, Tensor] | None = None,
    centroids: Centroids | None = None,
    key_lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, Sq, D]` and log-sum-exp `[B, H, Sq]`, computed in `dtype` for `[B, H, S, D]`.

    With `dtype` equal to the inputs' it is the same-precision reference that tolerances are derived
    from: products and probabilities are rounded to `dtype`, sums and the softmax are wider.
    """
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    allowed = token_mask(plan, query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if key_lengths is not None:
        positions = torch.arange(key.shape[2], device=key.device)
        allowed = allowed & (positions < key_lengths[:, None])[:, None, None, :]
    scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    scores = scores.masked_fill(~allowed, -torch.inf)
    values = v
    if centroids is not None:
        extra = (q @ centroids.key.to(dtype).transpose(-1, -2)).to(wide) * scale
        rows = block_of_token(plan.q_blocks, plan.q_order, query.shape[2], plan.num_q_blocks)
        batch, heads = query.shape[:2]
        chosen = plan.mask().expand(batch, heads, -1, -1)
        chosen = chosen.gather(2, rows.expand(batch, heads, -1)[..., None].expand_as(extra))
        extra = extra + centroids.counts.to(wide).log()[:, :, None, :]
        scores = torch.cat((scores, extra.masked_fill(chosen, -torch.inf)), -1)
        values = torch.cat((v, centroids.value.to(dtype)), 2)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
    output = (weights.to(dtype) @ values).to(wide)
    if initial is not None:
        output, lse = merge_states(output, lse, initial[0].to(wide), initial[1].to(wide))
    return output.to(dtype), lse


def token_mask(
    plan: SparsePlan,
    batch: int,
    heads: int,
    q_length: int,
    k_length: int,
    rows: Tensor | None = None,
) -> Tensor:
    """The plan as bool `[B, H, Sq, Sk]` in the input's own order, or only some query `rows`."""
    block_of_q = block_of_token(plan.q_blocks, plan.q_order, q_length, plan.num_q_blocks)
    if rows is not None:
        block_of_q = block_of_q[..., rows.to(block_of_q.device)]
    block_of_k = block_of_token(plan.k_blocks, plan.k_order, k_length, plan.num_k_blocks)
    # A key token that is in no block belongs to an extra one that nobody attends.
    mask = torch.nn.functional.pad(plan.mask(), (0, 1)).expand(batch, heads, -1, -1)
    block_of_q, block_of_k = (
        t.to(mask.device).expand(batch, heads, -1) for t in (block_of_q, block_of_k)
    )
    mask = mask.gather(2, block_of_q[..., None].expand(-1, -1, -1, mask.shape[3]))
    return mask.gather(3, block_of_k[:, :, None].expand(-1, -1, mask.shape[2], -1))


def block_of_token(blocks: Blocks, order: Tensor | None, length: int, count: int) -> Tensor:
    """Block number of every token, int64 `[B|1, H|1, length]`; `count` for a token in none."""
    listed = length if order is None else order.shape[-1]
    device = (
        blocks.device if isinstance(blocks, Tensor) else order.device if order is not None else None
    )
    places = torch.arange(listed, device=device)
    if isinstance(blocks, Tensor):
        places = places.expand(*blocks.shape[:2], -1).contiguous()
        numbers = torch.searchsorted(blocks[..., 1:].contiguous(), places, right=True)
    else:
        numbers = (places // blocks)[None, None]
    if order is None:
        return numbers
    shape = torch.broadcast_shapes(numbers.shape[:2], order.shape[:2])
    result = torch.full((*shape, length), count, dtype=torch.int64, device=device)
    return result.scatter_(
        2, order.long().expand(*shape, -1), numbers.expand(*shape, -1).to(torch.int64)
    )
