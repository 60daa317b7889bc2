"""The torch path: gather the chosen keys, then dense attention on what was gathered.

Made for CPUs, and faster than dense attention there. Centroids are keys like all others, gathered
behind them, with their bias as a mask. Heads go to a pool of threads that each run single-threaded
attention, because many small attentions that each ask OpenMP for all cores take longer than dense
attention does.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import CPU_FLASH
from .plan import Blocks, Centroids, SparsePlan, merge_states

# Small query blocks share calls of about as many rows. Larger blocks have one each: what is
# gathered for one of them stays in the cache, for several it does not.
ROWS_PER_CALL = 64
# Entries of the table of chosen keys that are held at a time.
CHOSEN = 1 << 22


def sparse_attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SparsePlan,
    scale: float,
    return_lse: bool,
    initial: tuple[Tensor, Tensor] | None = None,
    centroids: Centroids | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sparse attention on `[B, H, S, D]` views; the checks were made by the api.

    Returns:
        Output `[B, H, Sq, D]`, contiguous, and the LSE `[B, H, Sq]` or None.
    """
    batch, heads, length, _ = query.shape
    output = query.new_empty(query.shape)
    with_lse = return_lse or initial is not None
    lse = query.new_empty((batch, heads, length), dtype=_wide(query.dtype)) if with_lse else None
    mask = plan.mask()
    lengths = key_lengths.tolist() if key_lengths is not None else [key.shape[2]] * batch

    def one_head(index: int) -> None:
        b, h = divmod(index, heads)
        tables = HeadTables(
            _at(mask, b, h), _at(plan.q_blocks, b, h), _at(plan.k_blocks, b, h),
            _at(plan.q_order, b, h), _at(plan.k_order, b, h), lengths[b],
        )  # fmt: skip
        stand_ins = None if centroids is None else _centroids_at(centroids, b, h)
        o, s = _attend_head(query[b, h], key[b, h], value[b, h], tables, stand_ins, scale, with_lse)
        if initial is not None:
            o, s = merge_states(o, s, initial[0][b, h], initial[1][b, h])
        output[b, h] = o
        if lse is not None:
            lse[b, h] = s

    _over_heads(one_head, batch * heads, query.is_cuda)
    return output, lse.float() if return_lse and lse is not None else None


@dataclass(frozen=True)
class HeadTables:
    """A plan's tables for one head, in the plan's own token order."""

    mask: Tensor
    q_blocks: Blocks
    k_blocks: Blocks
    q_order: Tensor | None
    k_order: Tensor | None
    key_length: int


def _attend_head(
    q: Tensor, k: Tensor, v: Tensor, tables: HeadTables, centroids: Centroids | None, scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One head, `[S, D]`: output and LSE in input order. The LSE holds NaN if not asked for."""
    output = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:1], -torch.inf, dtype=_wide(q.dtype))
    if tables.q_order is not None:
        q = q.index_select(0, tables.q_order)
    is_key = _is_key(tables, k.shape[0])
    if tables.k_order is not None:
        # One pass over the keys, and then what a block gathers lies together.
        k, v = (t.index_select(0, tables.k_order) for t in (k, v))
    block_of_key = _blocks_of_places(tables.k_blocks, tables.mask.shape[1], k.shape[0], k.device)
    stand_in = bias = None
    if centroids is not None:
        # Behind the keys; a block of count 0 stands for nothing, whatever it holds.
        k, v = torch.cat((k, centroids.key)), torch.cat((v, centroids.value))
        stand_in = ~tables.mask & (centroids.counts > 0)
        bias = F.pad(centroids.counts.to(lse.dtype).log(), (len(block_of_key), 0))
    edges = block_edges(tables.q_blocks, tables.mask.shape[0], q.shape[0])
    chosen = _chosen_keys(tables.mask, block_of_key, is_key, stand_in)
    for blocks, index in _sharing_a_call(chosen, edges):
        rows, count = _rows_of(blocks, edges, q.device), len(blocks)
        keys, values = (t.index_select(0, index).view(count, 1, -1, q.shape[1]) for t in (k, v))
        block = q[rows].reshape(count, 1, -1, q.shape[1])
        biases = None
        if bias is not None:
            biases = bias.index_select(0, index).view(count, 1, 1, -1)
        o, s = attend(block, keys, values, scale, with_lse, biases)
        output[rows] = o.reshape(-1, q.shape[1])
        if with_lse:
            lse[rows] = s.reshape(-1)
    if tables.q_order is None:
        return output, lse
    back = tables.q_order.long()
    output = torch.empty_like(output).index_copy_(0, back, output)
    return output, lse.index_copy(0, back, lse)


def _is_key(tables: HeadTables, length: int) -> Tensor | None:
    """Which places of the plan's order hold keys before the key length; None for all."""
    if tables.key_length >= length:
        return None
    device = tables.mask.device
    tokens = torch.arange(length, device=device) if tables.k_order is None else tables.k_order
    return tokens < tables.key_length


def _blocks_of_places(blocks: Blocks, count: int, length: int, device: torch.device) -> Tensor:
    """The block of every place, `[length]`."""
    places = torch.arange(length, device=device)
    if isinstance(blocks, Tensor):
        return torch.bucketize(places, blocks[1:], right=True).clamp_max(count - 1)
    return places // blocks


def _chosen_keys(
    mask: Tensor, block_of_key: Tensor, is_key: Tensor | None, stand_in: Tensor | None
) -> Iterator[Tensor]:
    """For each query block the places of its keys, those of its stand-ins behind all keys."""
    each = max(1, CHOSEN // (len(block_of_key) + mask.shape[1]))
    for at in range(0, len(mask), each):
        used = mask[at : at + each].index_select(1, block_of_key)
        if is_key is not None:
            used &= is_key
        if stand_in is not None:
            used = torch.cat((used, stand_in[at : at + each]), 1)
        yield from used.nonzero()[:, 1].split(used.sum(1).tolist())


def _sharing_a_call(
    chosen: Iterator[Tensor], edges: list[int]
) -> Iterator[tuple[list[int], Tensor]]:
    """Query blocks and their keys; small blocks of one size with equally many keys go together."""
    waiting: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for i, keys in enumerate(chosen):
        rows = edges[i + 1] - edges[i]
        if not rows or not len(keys):
            continue
        group = waiting.setdefault((rows, len(keys)), [])
        group.append((i, keys))
        if (len(group) + 1) * rows > ROWS_PER_CALL:
            yield _joined(waiting.pop((rows, len(keys))))
    for group in waiting.values():
        yield _joined(group)


def _joined(group: list[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    blocks = [i for i, _ in group]
    return blocks, group[0][1] if len(group) == 1 else torch.cat([keys for _, keys in group])


def _rows_of(blocks: list[int], edges: list[int], device: torch.device) -> Tensor | slice:
    """Rows of some query blocks; a slice, which copies nothing, where they are neighbours."""
    if blocks[-1] - blocks[0] == len(blocks) - 1:
        return slice(edges[blocks[0]], edges[blocks[-1] + 1])
    return torch.cat([torch.arange(edges[i], edges[i + 1], device=device) for i in blocks])


def block_edges(blocks: Blocks, count: int, length: int) -> list[int]:
    """First rows of the blocks of one head, and the end."""
    if isinstance(blocks, Tensor):
        return blocks.tolist()
    return [min(i * blocks, length) for i in range(count + 1)]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dense attention on `[n, 1, S, D]`, and its LSE `[n, 1, S]` (NaN unless asked for).

    bias: Added to the logits, fp32 or wider `[n, 1, 1, Sk]`.
    """
    wide = _wide(q.dtype)
    if not with_lse and bias is None:
        o = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return o, o.new_full(o.shape[:3], torch.nan, dtype=wide)
    if not q.is_cuda and CPU_FLASH is not None:
        mask = None if bias is None else bias.expand(-1, -1, q.shape[2], -1)
        return CPU_FLASH(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if bias is not None:
        scores += bias
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def _centroids_at(centroids: Centroids, b: int, h: int) -> Centroids:
    return Centroids(centroids.key[b, h], centroids.value[b, h], _at(centroids.counts, b, h))


def _at(table: Any, b: int, h: int) -> Any:
    """One head's row of a table that may be shared by all batch entries or heads."""
    if not isinstance(table, Tensor):
        return table
    return table[min(b, table.shape[0] - 1), min(h, table.shape[1] - 1)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _over_heads(work: Callable[[int], None], count: int, on_gpu: bool) -> None:
    """Run `work(0..count-1)`, on a pool with one torch thread each where that helps."""
    threads = min(torch.get_num_threads(), count)
    if on_gpu or threads == 1:
        for index in range(count):
            work(index)
        return
    inference = torch.is_inference_mode_enabled()

    def guarded(index: int) -> None:
        # Grad modes belong to threads; the caller's does not reach the pool's.
        with torch.inference_mode() if inference else torch.no_grad():
            work(index)

    with single_threaded_workers(threads) as pool:
        for _ in pool.map(guarded, range(count)):
            pass


@contextlib.contextmanager
def single_threaded_workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `threads` workers in which torch uses one thread; the caller's setting survives."""
    before = torch.get_num_threads()
    # The matrix library has one setting for all threads: while the pool works it has to be 1 here
    # too.
    torch.set_num_threads(1)
    try:
        yield _pool(threads)
    finally:
        torch.set_num_threads(before)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "blockcache", initializer=lambda: torch.set_num_threads(1))
