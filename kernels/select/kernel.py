"""Selection without a sort: bisection for a threshold over a row held in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import on_device


@triton.jit
def count_above(b_key, b_weight, limit, INCLUSIVE: tl.constexpr):
    """Smallest key whose strictly (or, INCLUSIVE, weakly) larger entries weigh less than `limit`.

    INCLUSIVE asks for "at most" in place of "less". Exact: the keys are ordered integers.
    """
    low = tl.min(b_key, 0) - 1
    high = tl.max(b_key, 0)
    if INCLUSIVE:
        high += 1
    for _ in range(33):
        # Half way without overflow
        mid = (low >> 1) + (high >> 1) + (low & high & 1)
        if INCLUSIVE:
            found = tl.sum(tl.where(b_key >= mid, b_weight, 0.0), 0) <= limit
        else:
            found = tl.sum(tl.where(b_key > mid, b_weight, 0.0), 0) < limit
        high = tl.where((low < high) & found, mid, high)
        low = tl.where((low < high) & ~found, mid + 1, low)
        low = tl.minimum(low, high)
    return high


@triton.jit
def first_entries(b_key, m_n, count):
    """True for the `count` largest entries; equal ones in ascending order."""
    b_one = tl.where(m_n, 1.0, 0.0)
    edge = count_above(b_key, b_one, count, False)
    above = tl.sum(tl.where(b_key > edge, b_one, 0.0), 0)
    b_tie = tl.where((b_key == edge) & m_n, 1.0, 0.0)
    b_before = tl.cumsum(b_tie, 0) - b_tie
    return m_n & ((b_key > edge) | ((b_tie > 0.0) & (above + b_before < count)))


@triton.jit
def select_blocks_fwd_kernel(
    scores,
    amounts,
    forced,
    out,
    n_q,
    n_k,
    least,
    most,
    RULE: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row: its mask."""
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < n_k
    b_s = tl.load(scores + i_row * n_k + o_n, mask=m_n, other=float("-inf")).to(tl.float32)
    b_s = tl.where(b_s == b_s, b_s, float("-inf"))
    # Integers in the order of the floats, negative ones included. -0.0 and 0.0 tie.
    b_key = tl.where(b_s == 0.0, 0.0, b_s).to(tl.int32, bitcast=True)
    b_key = tl.where(b_key < 0, b_key ^ 0x7FFFFFFF, b_key)
    amount = tl.load(amounts + i_row // n_q)

    if RULE == "C":
        count = amount
    else:
        b_mass = tl.where(m_n, tl.maximum(b_s, 0.0), 0.0)
        limit = amount * tl.sum(b_mass, 0)
        edge = count_above(b_key, b_mass, limit, RULE == "B")
        if RULE == "A":
            b_sure = b_key > edge
        else:
            b_sure = b_key >= edge
        above = tl.sum(tl.where(b_sure, b_mass, 0.0), 0)
        # The entries that tie where the limit is crossed are counted one by one.
        if RULE == "A":
            b_tie = (b_key == edge) & m_n
            before = tl.where(b_tie, b_mass, 0.0)
            before = above + tl.cumsum(before, 0) - before
            b_kept = b_sure | (b_tie & (before < limit))
        else:
            next_key = tl.max(tl.where(b_sure, -2147483648, b_key), 0)
            b_tie = (b_key == next_key) & m_n & (~b_sure)
            behind = above + tl.cumsum(tl.where(b_tie, b_mass, 0.0), 0)
            b_kept = b_sure | (b_tie & (behind <= limit))
        count = tl.sum(tl.where(b_kept & m_n, 1.0, 0.0), 0)
        if RULE == "A":
            count = tl.where(amount >= 1.0, n_k * 1.0, count)
        else:
            count = tl.maximum(count, 1.0)
    count = tl.minimum(tl.maximum(count, least * 1.0), most * 1.0)

    b_out = first_entries(b_key, m_n, count)
    if HAS_FORCED:
        b_forced = (tl.load(forced + i_row * n_k + o_n, mask=m_n, other=0) != 0) & m_n
        chosen = tl.sum(tl.where(b_out & (~b_forced), 1.0, 0.0), 0)
        room = most * 1.0 - tl.sum(tl.where(b_forced, 1.0, 0.0), 0)
        rest = tl.minimum(chosen, tl.maximum(room, 0.0))
        b_out = b_forced | first_entries(b_key, m_n & (~b_forced), rest)
    tl.store(out + i_row * n_k + o_n, b_out.to(tl.int8), mask=m_n)


def select_blocks_triton(
    scores: Tensor, letter: str, amount: Tensor, forced: Tensor | None, least: int, most: int
) -> Tensor:
    """Launch one program per row; `amount` is fp32 `[B, H]`, limits are in blocks."""
    scores = scores.contiguous()
    batch, heads, n_q, n_k = scores.shape
    out = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if out.numel() == 0:
        return out
    block = triton.next_power_of_2(n_k)
    with on_device(scores):
        select_blocks_fwd_kernel[(batch * heads * n_q,)](
            scores,
            amount.contiguous(),
            scores if forced is None else forced.contiguous().view(torch.int8),
            out.view(torch.int8),
            n_q,
            n_k,
            least,
            most,
            RULE=letter,
            HAS_FORCED=forced is not None,
            BLOCK_N=block,
            num_warps=8 if block >= 2048 else 4,
            enable_fp_fusion=True,
        )
    return out
