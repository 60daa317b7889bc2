"""The one block-sparse forward kernel, and how it is launched.

An online softmax over key tiles as in FlashAttention-2 (2307.08691); which tiles comes from a
table. Fixed blocks, blocks of any lengths, gathered rows, dense runs, a start from an earlier
(output, LSE) and centroids for what was not chosen are compile-time switches of the same loop.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import capability, interpreted, on_device
from .plan import Centroids, SparsePlan
from .tiles import KeyTiles, QueryTiles

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    base, b_rows, stride, m_rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):
    """Columns FIRST to FIRST + WIDTH of some rows; 0 outside the mask and beyond D."""
    o_d = FIRST + tl.arange(0, WIDTH)
    p_rows = base + b_rows[:, None] * stride + o_d[None, :]
    if FIRST + WIDTH <= D:
        return tl.load(p_rows, mask=m_rows[:, None], other=0.0)
    return tl.load(p_rows, mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def load_rows_whole(
    base, b_rows, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):
    """The same for rows that all exist."""
    o_d = FIRST + tl.arange(0, WIDTH)
    p_rows = base + b_rows[:, None] * stride + o_d[None, :]
    if FIRST + WIDTH <= D:
        return tl.load(p_rows)
    return tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def softmax_step(b_s, scale, b_m, b_l):
    """Fold raw scores into the running maximum and sum, both in units of log2."""
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    # A row that has met no key yet subtracts 0, so that -inf minus -inf never happens.
    b_ref = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.exp2(b_s * scale - b_ref[:, None])
    b_alpha = tl.exp2(b_m - b_ref)
    return b_p, b_alpha, b_m_new, b_l * b_alpha + tl.sum(b_p, 1)


@triton.jit
def sparse_attention_fwd_kernel(
    q, k, v, o, lse,
    table, counts, q_start, q_end, q_block, k_start, k_end, q_order, k_order,
    key_lengths, init_o, init_lse, c_key, c_value, c_bias, bits,
    H, Sq, Sk, n_c, scale,
    sq_b, sq_h, sq_s, sk_b, sk_h, sk_s, sv_b, sv_h, sv_s, so_b, so_h, so_s,
    st_b, st_h, st_q, sn_b, sn_h, sx_b, sx_h, sy_b, sy_h,
    sg_b, sg_h, sc_b, sc_h, si_b, si_h, si_s, sj_b, sj_h,
    sck_b, sck_h, sck_s, scv_b, scv_h, scv_s, scb_b, scb_h, sb_b, sb_h, sb_q,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr,
    DENSE: tl.constexpr, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr,
    GATHER_Q: tl.constexpr, GATHER_K: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_INIT: tl.constexpr, HAS_CENTROIDS: tl.constexpr,
    HAS_LSE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of query rows against the key tiles listed for it."""
    i_t = tl.program_id(0)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)

    # The query rows of this tile, and the row of the table that speaks for them.
    if RAGGED_Q:
        o_x = i_b * sx_b + i_h * sx_h + i_t
        i_q = tl.load(q_block + o_x)
        i_first = tl.load(q_start + o_x)
        i_end = tl.load(q_end + o_x)
        has_rows = i_first < i_end
        o_q = i_first + tl.arange(0, BLOCK_Q)
        m_q = o_q < i_end
    else:
        i_q = i_t // SUB_Q
        o_q = i_t * BLOCK_Q + tl.arange(0, BLOCK_Q)
        m_q = o_q < Sq
    b_rows = o_q.to(tl.int64)
    if GATHER_Q:
        b_rows = tl.load(q_order + i_b * sg_b + i_h * sg_h + o_q, mask=m_q, other=0).to(tl.int64)

    p_q = q + i_b * sq_b + i_h * sq_h
    p_k = k + i_b * sk_b + i_h * sk_h
    p_v = v + i_b * sv_b + i_h * sv_h
    # [BLOCK_Q, D0], [BLOCK_Q, D1]
    b_q0 = load_rows(p_q, b_rows, sq_s, m_q, 0, D0, D)
    if D1 > 0:
        b_q1 = load_rows(p_q, b_rows, sq_s, m_q, D0, D1, D)
    if UPCAST:
        b_q0 = b_q0.to(tl.float32)
        if D1 > 0:
            b_q1 = b_q1.to(tl.float32)

    b_m = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_o0 = tl.zeros([BLOCK_Q, D0], dtype=tl.float32)
    if D1 > 0:
        b_o1 = tl.zeros([BLOCK_Q, D1], dtype=tl.float32)
    if HAS_INIT:
        p_lse0 = init_lse + i_b * sj_b + i_h * sj_h + b_rows
        b_m = tl.load(p_lse0, mask=m_q, other=float("-inf")) * LOG2E
        b_l = tl.where(b_m == float("-inf"), 0.0, 1.0)
        p_o0 = init_o + i_b * si_b + i_h * si_h
        m_init = m_q & (b_l > 0.0)
        b_o0 = load_rows(p_o0, b_rows, si_s, m_init, 0, D0, D).to(tl.float32)
        if D1 > 0:
            b_o1 = load_rows(p_o0, b_rows, si_s, m_init, D0, D1, D).to(tl.float32)

    last = Sk
    if HAS_LENGTHS:
        last = tl.load(key_lengths + i_b).to(tl.int32)
    if DENSE:
        n_tiles = tl.cdiv(tl.minimum(last, Sk), BLOCK_K)
    else:
        n_tiles = tl.load(counts + i_b * sn_b + i_h * sn_h + i_q) * SUB_K
    if RAGGED_Q:
        # Tiles beyond the last block have no rows.
        n_tiles = tl.where(has_rows, n_tiles, 0)
        n_c = tl.where(has_rows, n_c, 0)
    p_table = table + i_b * st_b + i_h * st_h + i_q.to(tl.int64) * st_q
    p_ks = k_start + i_b * sy_b + i_h * sy_h
    p_ke = k_end + i_b * sy_b + i_h * sy_h

    # The table is read one tile ahead, so that the address of a tile never waits for it.
    if not DENSE:
        ahead = tl.load(p_table)
        if RAGGED_K:
            stop_ahead = tl.load(p_ke + ahead)
            ahead = tl.load(p_ks + ahead)
    for i_n in tl.range(0, n_tiles):
        stop = Sk
        if DENSE:
            start = i_n * BLOCK_K
        else:
            start = ahead
            ahead = tl.load(p_table + tl.minimum(i_n + 1, n_tiles - 1) // SUB_K)
            if RAGGED_K:
                stop = stop_ahead
                stop_ahead = tl.load(p_ke + ahead)
                ahead = tl.load(p_ks + ahead)
            else:
                start = (start * SUB_K + i_n % SUB_K) * BLOCK_K
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < stop
        # The keys' own token numbers, [BLOCK_K]
        b_keys = o_k.to(tl.int64)
        if GATHER_K:
            b_keys = tl.load(k_order + i_b * sc_b + i_h * sc_h + o_k, mask=m_k, other=0).to(
                tl.int64
            )
        if HAS_LENGTHS:
            m_k = m_k & (b_keys < last)
        if EVEN_K:
            b_k0 = load_rows_whole(p_k, b_keys, sk_s, 0, D0, D)
            b_v0 = load_rows_whole(p_v, b_keys, sv_s, 0, D0, D)
            if D1 > 0:
                b_k1 = load_rows_whole(p_k, b_keys, sk_s, D0, D1, D)
                b_v1 = load_rows_whole(p_v, b_keys, sv_s, D0, D1, D)
        else:
            b_k0 = load_rows(p_k, b_keys, sk_s, m_k, 0, D0, D)
            b_v0 = load_rows(p_v, b_keys, sv_s, m_k, 0, D0, D)
            if D1 > 0:
                b_k1 = load_rows(p_k, b_keys, sk_s, m_k, D0, D1, D)
                b_v1 = load_rows(p_v, b_keys, sv_s, m_k, D0, D1, D)
        if UPCAST:
            b_k0 = b_k0.to(tl.float32)
            b_v0 = b_v0.to(tl.float32)
            if D1 > 0:
                b_k1 = b_k1.to(tl.float32)
                b_v1 = b_v1.to(tl.float32)
        # [BLOCK_Q, BLOCK_K]
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)
        if D1 > 0:
            b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=PRECISION)
        if not EVEN_K:
            b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_p, b_alpha, b_m, b_l = softmax_step(b_s, scale * LOG2E, b_m, b_l)
        b_p = b_p.to(b_v0.dtype)
        b_o0 = tl.dot(b_p, b_v0, b_o0 * b_alpha[:, None], input_precision=PRECISION)
        if D1 > 0:
            b_o1 = tl.dot(b_p, b_v1, b_o1 * b_alpha[:, None], input_precision=PRECISION)

    if HAS_CENTROIDS:
        p_ck = c_key + i_b * sck_b + i_h * sck_h
        p_cv = c_value + i_b * scv_b + i_h * scv_h
        p_bits = bits + i_b * sb_b + i_h * sb_h + i_q.to(tl.int64) * sb_q
        for i_c in tl.range(0, n_c, BLOCK_K):
            o_c = i_c + tl.arange(0, BLOCK_K)
            m_c = o_c < n_c
            b_word = tl.load(p_bits + o_c // 32, mask=m_c, other=0)
            b_bias = tl.load(
                c_bias + i_b * scb_b + i_h * scb_h + o_c, mask=m_c, other=float("-inf")
            )
            b_bias = tl.where((b_word >> (o_c % 32)) & 1 == 1, float("-inf"), b_bias)
            m_c = m_c & (b_bias > float("-inf"))
            b_c0 = load_rows(p_ck, o_c.to(tl.int64), sck_s, m_c, 0, D0, D)
            b_w0 = load_rows(p_cv, o_c.to(tl.int64), scv_s, m_c, 0, D0, D)
            if UPCAST:
                b_c0 = b_c0.to(tl.float32)
                b_w0 = b_w0.to(tl.float32)
            b_s = tl.dot(b_q0, tl.trans(b_c0), input_precision=PRECISION)
            if D1 > 0:
                b_c1 = load_rows(p_ck, o_c.to(tl.int64), sck_s, m_c, D0, D1, D)
                if UPCAST:
                    b_c1 = b_c1.to(tl.float32)
                b_s = tl.dot(b_q1, tl.trans(b_c1), b_s, input_precision=PRECISION)
            b_s = b_s * scale + b_bias[None, :]
            b_p, b_alpha, b_m, b_l = softmax_step(b_s, LOG2E, b_m, b_l)
            b_p = b_p.to(b_w0.dtype)
            b_o0 = tl.dot(b_p, b_w0, b_o0 * b_alpha[:, None], input_precision=PRECISION)
            if D1 > 0:
                b_w1 = load_rows(p_cv, o_c.to(tl.int64), scv_s, m_c, D0, D1, D)
                if UPCAST:
                    b_w1 = b_w1.to(tl.float32)
                b_o1 = tl.dot(b_p, b_w1, b_o1 * b_alpha[:, None], input_precision=PRECISION)

    # No key at all: output 0, log-sum-exp -inf, which merges as nothing.
    b_inverse = 1.0 / tl.where(b_l == 0.0, 1.0, b_l)
    p_o = o + i_b * so_b + i_h * so_h + b_rows[:, None] * so_s
    o_d0 = tl.arange(0, D0)
    tl.store(
        p_o + o_d0[None, :],
        (b_o0 * b_inverse[:, None]).to(o.dtype.element_ty),
        mask=m_q[:, None] & (o_d0 < D)[None, :],
    )
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)
        tl.store(
            p_o + o_d1[None, :],
            (b_o1 * b_inverse[:, None]).to(o.dtype.element_ty),
            mask=m_q[:, None] & (o_d1 < D)[None, :],
        )
    if HAS_LSE:
        b_lse = b_m * LN2 + tl.log(tl.where(b_l == 0.0, 1.0, b_l))
        p_lse = lse + (i_b * H + i_h) * Sq + b_rows
        tl.store(p_lse, tl.where(b_l == 0.0, float("-inf"), b_lse), mask=m_q)


@triton.jit
def key_table_fwd_kernel(
    bits, k_block, k_start, k_end, table, counts,
    H, n_q, n_tiles, sb_b, sb_h, sb_q, sy_b, sy_h,
    RAGGED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query block: the numbers of its set bits, ascending."""
    i_q = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    p_bits = bits + i_b * sb_b + i_h * sb_h + i_q * sb_q
    i_row = (i_b * H + i_h) * n_q + i_q
    # How many are written already; a vector, so that the loop carries one type.
    b_found = tl.zeros([1], dtype=tl.int32)
    for i_n in range(0, n_tiles, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < n_tiles
        b_block = o_n
        if RAGGED:
            o_y = i_b * sy_b + i_h * sy_h + o_n
            b_block = tl.load(k_block + o_y, mask=m_n, other=0)
            b_start = tl.load(k_start + o_y, mask=m_n, other=0)
            m_n = m_n & (b_start < tl.load(k_end + o_y, mask=m_n, other=0))
        b_word = tl.load(p_bits + b_block // 32, mask=m_n, other=0)
        b_bit = (b_word >> (b_block % 32)) & 1
        b_place = b_found + tl.cumsum(b_bit, 0) - b_bit
        tl.store(table + i_row * n_tiles + b_place, o_n, mask=b_bit == 1)
        b_found += tl.sum(b_bit, 0)
    o_1 = tl.arange(0, 1)
    tl.store(counts + i_row + o_1, b_found)
    # The first entry of an empty row is read, though not used.
    tl.store(table + i_row * n_tiles + o_1, tl.zeros([1], dtype=tl.int32), mask=b_found == 0)


class Tiling(NamedTuple):
    """Compile-time sizes of one launch."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def split_head_dim(head_dim: int, itemsize: int) -> tuple[int, int]:
    """Two powers of two that cover the head dimension with little padding: 80 is 64 + 16.

    Padding 80 to 128 would spend 37 % of the matrix work on zeros; 112 would need three parts, and
    one padded part costs less than that. In fp32 two parts do not fit the registers.
    """
    for first, second in ((16, 0), (32, 0), (64, 0), (64, 16), (64, 32), (128, 0)):
        if head_dim <= first + second and (second == 0 or itemsize < 4):
            return first, second
    raise ValueError(
        f"head dimension {head_dim} is above 128, the most that the Triton kernel holds in "
        "registers; use backend='torch'."
    )


def choose_tiling(
    head_dim: int, itemsize: int, q_rows: int, k_rows: int, capability: int, crowded: bool
) -> Tiling:
    """Tile sizes for blocks of about `q_rows` x `k_rows` tokens.

    The largest that spill no registers on sm_80, sm_90 and sm_100; kernels/README.md has the table.
    `crowded` says that centroids, or masks for a head dimension that is no multiple of 16 on top
    of masks for blocks of any lengths, are compiled in; they take registers of their own.
    """
    if itemsize == 4:
        # Masks for padded columns take registers too.
        padded = head_dim not in (16, 32, 64, 128)
        most_q = 16 if padded else 64 if head_dim <= 64 and not crowded else 32
        return Tiling(min(q_rows, most_q), min(k_rows, 32), 8, 2)
    if crowded and head_dim % 16:
        return Tiling(min(q_rows, 64), min(k_rows, 32), 8, 2)
    most_k = 32 if crowded and head_dim > 64 and capability != 90 else 64
    block_q = min(q_rows, 128)
    return Tiling(block_q, min(k_rows, most_k), 8 if block_q == 128 else 4, 3)


def sparse_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor | None,
    plan: SparsePlan | None,
    scale: float,
    initial: tuple[Tensor, Tensor] | None = None,
    centroids: Centroids | None = None,
    key_lengths: Tensor | None = None,
    precision: str = "tf32x3",
) -> None:
    """Launch on `[B, H, S, D]` views and fill `output` and `lse`; `plan=None` is dense.

    Checks were made by the api. `lse` is contiguous `[B, H, Sq]`; None leaves it out.
    """
    batch, heads, q_length, head_dim = query.shape
    k_listed = key.shape[2]
    if plan is not None and plan.k_order is not None:
        k_listed = plan.k_order.shape[2]
    if output.numel() == 0:
        return
    q_tiles = QueryTiles.of(plan, q_length)
    k_tiles = KeyTiles.of(plan, k_listed)
    plan_blocks = None if plan is None else plan.k_blocks
    tiling = choose_tiling(
        head_dim, query.element_size(), q_tiles.rows, k_tiles.rows, capability(query),
        crowded=centroids is not None or (head_dim % 16 > 0 and isinstance(plan_blocks, Tensor)),
    )  # fmt: skip
    q_tiles, k_tiles = q_tiles.cut(tiling.block_q), k_tiles.cut(tiling.block_k)
    table, counts = (None, None) if plan is None else key_table(plan, k_tiles)
    bias = centroids.counts.float().log() if centroids is not None else None
    d0, d1 = split_head_dim(head_dim, query.element_size())

    def per_head(tensor: Tensor | None) -> Tensor:
        """Shared tables as views over all heads; absent ones as something that is never read."""
        if tensor is None:
            return query.new_empty(1).expand(1, 1, 1, 1)
        return tensor.expand(batch, heads, *tensor.shape[2:])

    table, counts = per_head(table), per_head(counts)
    q_start, q_end, q_block = (per_head(t) for t in (q_tiles.start, q_tiles.end, q_tiles.block))
    k_start, k_end = per_head(k_tiles.start), per_head(k_tiles.end)
    q_order = per_head(plan.q_order if plan is not None else None)
    k_order = per_head(plan.k_order if plan is not None else None)
    init_o, init_lse = (per_head(t) for t in initial or (None, None))
    c_key, c_value = (
        per_head(t) for t in ((centroids.key, centroids.value) if centroids else (None, None))
    )
    c_bias = per_head(bias)
    bits = per_head(plan.bits if plan is not None else None)
    ragged_k = k_tiles.start is not None
    with on_device(query):
        sparse_attention_fwd_kernel[(q_tiles.count, batch * heads)](
            query, key, value, output, lse if lse is not None else query,
            table, counts, q_start, q_end, q_block, k_start, k_end, q_order, k_order,
            key_lengths if key_lengths is not None else query,
            init_o, init_lse, c_key, c_value, c_bias, bits,
            heads, q_length, k_listed, centroids.key.shape[2] if centroids else 0,
            scale,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
            *table.stride()[:3], *counts.stride()[:2], *q_start.stride()[:2], *k_start.stride()[:2],
            *q_order.stride()[:2], *k_order.stride()[:2], *init_o.stride()[:3],
            *init_lse.stride()[:2],
            *c_key.stride()[:3], *c_value.stride()[:3], *c_bias.stride()[:2], *bits.stride()[:3],
            D=head_dim, D0=d0, D1=d1,
            BLOCK_Q=tiling.block_q, BLOCK_K=tiling.block_k,
            SUB_Q=q_tiles.per_block, SUB_K=k_tiles.per_block,
            DENSE=plan is None, RAGGED_Q=q_tiles.start is not None, RAGGED_K=ragged_k,
            GATHER_Q=plan is not None and plan.q_order is not None,
            GATHER_K=plan is not None and plan.k_order is not None,
            EVEN_K=not ragged_k and key_lengths is None and k_listed % tiling.block_k == 0,
            HAS_LENGTHS=key_lengths is not None, HAS_INIT=initial is not None,
            HAS_CENTROIDS=centroids is not None, HAS_LSE=lse is not None,
            UPCAST=interpreted() and query.dtype == torch.bfloat16, PRECISION=precision,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def key_table(plan: SparsePlan, tiles: KeyTiles) -> tuple[Tensor, Tensor]:
    """For each query block the tiles (or, of one size, the blocks) it attends, and how many.

    Returns:
        Ascending numbers, int32 `[B|1, H|1, nQ, width]`, and counts, int32 `[B|1, H|1, nQ]`. What
        lies beyond a row's count is not defined, except that the first entry can be read.
    """
    ragged = tiles.start is not None
    leading = plan.bits.shape[:2]
    width = plan.num_k_blocks
    if tiles.start is not None:
        leading = torch.broadcast_shapes(leading, tiles.start.shape[:2])
        width = tiles.start.shape[2]
    bits = plan.bits.contiguous().expand(*leading, -1, -1)
    block, start, end = (
        bits if t is None else t.expand(*leading, -1) for t in (tiles.block, tiles.start, tiles.end)
    )
    counts = bits.new_empty((*leading, plan.num_q_blocks))
    table = bits.new_empty((*leading, plan.num_q_blocks, width))
    with on_device(bits):
        key_table_fwd_kernel[(plan.num_q_blocks, leading[0] * leading[1])](
            bits, block, start, end, table, counts, leading[1], plan.num_q_blocks, width,
            *bits.stride()[:3], *start.stride()[:2],
            RAGGED=ragged, BLOCK_N=1024 if width > 256 else 256, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return table, counts
