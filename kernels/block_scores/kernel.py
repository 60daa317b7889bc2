"""Triton kernels of the scorers, and how they are launched. Tensors are `[B, H, S, D]` views."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import interpreted, on_device
from .reference import Pooled, block_offsets

LOG2E = tl.constexpr(1.4426950408889634)
# Most rows and columns of a tile; larger blocks are computed in parts that are added.
TILE = 64
TILE_FP32 = 16


@triton.jit
def load_tile(
    base, b_rows, stride, m_rows, D: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr
):
    """Some rows, padded with 0 to WIDTH columns."""
    o_d = tl.arange(0, WIDTH)
    p_rows = base + b_rows.to(tl.int64)[:, None] * stride + o_d[None, :]
    b_x = tl.load(p_rows, mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)
    return b_x.to(tl.float32) if UPCAST else b_x


@triton.jit
def mean_pool_fwd_kernel(
    x, offsets, order, mean, similarity,
    H, n, sx_b, sx_h, sx_s, sf_b, sf_h, sg_b, sg_h,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    GATHER: tl.constexpr, HAS_SIMILARITY: tl.constexpr,
):  # fmt: skip
    """One block: mean of its rows, squared length of their mean direction."""
    i_n = tl.program_id(0)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    p_f = offsets + i_b * sf_b + i_h * sf_h + i_n
    start = tl.load(p_f)
    end = tl.load(p_f + 1)
    p_x = x + i_b * sx_b + i_h * sx_h
    # [WIDTH]
    b_sum = tl.zeros([WIDTH], dtype=tl.float32)
    b_unit = tl.zeros([WIDTH], dtype=tl.float32)
    for i_s in range(start, end, ROWS):
        o_s = i_s + tl.arange(0, ROWS)
        m_s = o_s < end
        b_rows = o_s
        if GATHER:
            b_rows = tl.load(order + i_b * sg_b + i_h * sg_h + o_s, mask=m_s, other=0)
        b_x = load_tile(p_x, b_rows, sx_s, m_s, D, WIDTH, True)
        b_sum += tl.sum(b_x, 0)
        if HAS_SIMILARITY:
            b_norm = tl.sqrt(tl.sum(b_x * b_x, 1))
            b_norm = tl.where(b_norm > 0.0, b_norm, 1.0)
            b_unit += tl.sum(b_x / b_norm[:, None], 0)
    size = tl.maximum(end - start, 1).to(tl.float32)
    o_d = tl.arange(0, WIDTH)
    i_out = (i_b * H + i_h) * n + i_n
    tl.store(mean + i_out * D + o_d, b_sum / size, mask=o_d < D)
    if HAS_SIMILARITY:
        b_sim = tl.sum(b_unit * b_unit, 0) / (size * size)
        tl.store(similarity + i_out, tl.where(end > start, b_sim, 1.0))


@triton.jit
def cell_logits(
    p_q, p_k, o_m, o_n, sq_s, sk_s, Sq, Sk, c_q, c_k, scale,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Antidiagonal means of cells in units of log2, with the weight of cut-off key cells added."""
    b_s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_t in range(STRIDE):
        b_q = load_tile(
            p_q,
            tl.minimum(o_m * STRIDE + (STRIDE - 1 - i_t), Sq - 1),
            sq_s,
            o_m < c_q,
            D,
            WIDTH,
            UPCAST,
        )
        b_k = load_tile(
            p_k, tl.minimum(o_n * STRIDE + i_t, Sk - 1), sk_s, o_n < c_k, D, WIDTH, UPCAST
        )
        b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="tf32x3")
    b_part = tl.minimum(Sk - o_n * STRIDE, STRIDE).to(tl.float32) / STRIDE
    b_bias = tl.where(o_n < c_k, tl.log2(tl.where(o_n < c_k, b_part, 1.0)), float("-inf"))
    return b_s * (scale * LOG2E) + b_bias[None, :]


@triton.jit
def antidiagonal_fwd_kernel(
    q, k, out,
    H, Sq, Sk, c_q, c_k, n_q, n_k, scale, sq_b, sq_h, sq_s, sk_b, sk_h, sk_s,
    D: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CELLS_Q: tl.constexpr, CELLS_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Some rows of cells: softmax over key cells, summed per block."""
    i_m = tl.program_id(0)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    p_q = q + i_b * sq_b + i_h * sq_h
    p_k = k + i_b * sk_b + i_h * sk_h
    PART_Q: tl.constexpr = BLOCK_M // CELLS_Q
    PART_K: tl.constexpr = BLOCK_N // CELLS_K
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # First sweep: what each row of cells has to be divided by.
    b_m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BLOCK_M], dtype=tl.float32)
    for i_n in range(0, c_k, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_s = cell_logits(
            p_q, p_k, o_m, o_n, sq_s, sk_s, Sq, Sk, c_q, c_k, scale,
            STRIDE, D, WIDTH, BLOCK_M, BLOCK_N, UPCAST,
        )  # fmt: skip
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_l = b_l * tl.exp2(b_m - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_m = b_new
    b_share = tl.minimum(Sq - o_m * STRIDE, STRIDE).to(tl.float32) / STRIDE
    b_share = tl.where(o_m < c_q, b_share, 0.0) / b_l
    # Second sweep: the same logits again, which costs less than storing them.
    o_p = i_m * PART_Q + tl.arange(0, PART_Q)
    for i_n in range(0, c_k, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_s = cell_logits(
            p_q, p_k, o_m, o_n, sq_s, sk_s, Sq, Sk, c_q, c_k, scale,
            STRIDE, D, WIDTH, BLOCK_M, BLOCK_N, UPCAST,
        )  # fmt: skip
        b_p = tl.exp2(b_s - b_m[:, None]) * b_share[:, None]
        b_w = tl.sum(tl.sum(tl.reshape(b_p, [PART_Q, CELLS_Q, PART_K, CELLS_K]), 3), 1)
        o_w = i_n // CELLS_K + tl.arange(0, PART_K)
        p_w = out + ((i_b * H + i_h) * n_q + o_p[:, None]) * n_k + o_w[None, :]
        tl.store(p_w, b_w, mask=(o_p < n_q)[:, None] & (o_w < n_k)[None, :])


@triton.jit
def block_mass_fwd_kernel(
    q, k, lse, out,
    H, Sq, Sk, n_q, n_k, scale, sq_b, sq_h, sq_s, sk_b, sk_h, sk_s, sl_b, sl_h, sl_s,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, ROW_STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One query block: its exact mass on every key block."""
    i_q = tl.program_id(0)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    o_r = tl.arange(0, ROWS) * ROW_STEP
    o_q = i_q * BLOCK_Q + o_r
    m_q = (o_q < Sq) & (o_r < BLOCK_Q)
    b_q = load_tile(q + i_b * sq_b + i_h * sq_h, o_q, sq_s, m_q, D, WIDTH, UPCAST)
    p_lse = lse + i_b * sl_b + i_h * sl_h + o_q.to(tl.int64) * sl_s
    b_lse = tl.load(p_lse, mask=m_q, other=0.0) * LOG2E
    held = tl.minimum(Sq - i_q * BLOCK_Q, BLOCK_Q).to(tl.float32)
    factor = held / tl.sum(m_q.to(tl.float32), 0)
    p_k = k + i_b * sk_b + i_h * sk_h
    p_out = out + ((i_b * H + i_h) * n_q + i_q) * n_k
    for i_k in range(0, n_k):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < Sk
        b_k = load_tile(p_k, o_k, sk_s, m_k, D, WIDTH, UPCAST)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * (scale * LOG2E)
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_p = tl.where(m_q[:, None] & m_k[None, :], b_p, 0.0)
        tl.store(p_out + i_k, tl.sum(b_p) * factor)


@triton.jit
def assign_clusters_fwd_kernel(
    x, centroids, bias, labels,
    H, S, C, sx_b, sx_h, sx_s, sc_b, sc_h, sc_s, sb_b, sb_h,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Some tokens: number of the nearest centroid."""
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    b_x = load_tile(x + i_b * sx_b + i_h * sx_h, o_s, sx_s, o_s < S, D, WIDTH, UPCAST)
    b_best = tl.full([BLOCK_S], float("-inf"), dtype=tl.float32)
    b_label = tl.zeros([BLOCK_S], dtype=tl.int32)
    p_c = centroids + i_b * sc_b + i_h * sc_h
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_c = load_tile(p_c, o_c, sc_s, m_c, D, WIDTH, UPCAST)
        b_bias = tl.load(bias + i_b * sb_b + i_h * sb_h + o_c, mask=m_c, other=float("inf"))
        b_near = tl.dot(b_x, tl.trans(b_c), input_precision="tf32x3") - b_bias[None, :]
        b_top, b_arg = tl.max(b_near, 1, return_indices=True)
        b_label = tl.where(b_top > b_best, b_arg.to(tl.int32) + i_c, b_label)
        b_best = tl.maximum(b_best, b_top)
    tl.store(labels + (i_b * H + i_h) * S + o_s, b_label, mask=o_s < S)


def mean_pool_triton(
    x: Tensor, blocks: int | Tensor, order: Tensor | None, with_similarity: bool
) -> Pooled:
    """One program per block; blocks of one size are offsets too."""
    batch, heads, length, head_dim = x.shape
    if order is not None:
        length = order.shape[2]
    offsets = block_offsets(blocks, length, x.device)
    n = offsets.shape[2] - 1
    mean = torch.empty((batch, heads, n, head_dim), dtype=torch.float32, device=x.device)
    similarity = mean.new_empty((batch, heads, n)) if with_similarity else None
    shared = offsets.expand(batch, heads, -1)
    gather = x if order is None else order.expand(batch, heads, -1)
    with on_device(x):
        mean_pool_fwd_kernel[(n, batch * heads)](
            x, shared, gather, mean, mean if similarity is None else similarity,
            heads, n, *x.stride()[:3], *shared.stride()[:2], *gather.stride()[:2],
            D=head_dim, WIDTH=_width(head_dim), ROWS=32,
            GATHER=order is not None, HAS_SIMILARITY=with_similarity,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return Pooled(mean, similarity, offsets.diff(dim=-1))


def antidiagonal_scores_triton(
    query: Tensor, key: Tensor, stride: int, block_q: int, block_k: int, scale: float
) -> Tensor:
    """Two sweeps over cells, in tiles of whole blocks or of parts that are added after."""
    batch, heads, q_length, head_dim = query.shape
    k_length = key.shape[2]
    tile = TILE_FP32 if query.dtype == torch.float32 else TILE
    part_q, part_k = min(block_q, tile * stride), min(block_k, tile * stride)
    n_q, n_k = triton.cdiv(q_length, part_q), triton.cdiv(k_length, part_k)
    out = torch.empty((batch, heads, n_q, n_k), dtype=torch.float32, device=query.device)
    cells = triton.cdiv(q_length, stride)
    with on_device(query):
        antidiagonal_fwd_kernel[(triton.cdiv(cells, tile), batch * heads)](
            query, key, out, heads, q_length, k_length, cells, triton.cdiv(k_length, stride),
            n_q, n_k, scale / stride, *query.stride()[:3], *key.stride()[:3],
            D=head_dim, WIDTH=_width(head_dim), STRIDE=stride, BLOCK_M=tile, BLOCK_N=tile,
            CELLS_Q=part_q // stride, CELLS_K=part_k // stride, UPCAST=_upcast(query),
            num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return _join(out, block_q // part_q, block_k // part_k)


def block_mass_triton(
    query: Tensor, key: Tensor, lse: Tensor, block_q: int, block_k: int, row_step: int, scale: float
) -> Tensor:
    """The attention loop without values, in parts of blocks that are added after."""
    batch, heads, q_length, head_dim = query.shape
    tile = TILE_FP32 if query.dtype == torch.float32 else TILE
    part_q, part_k = min(block_q, tile * row_step), min(block_k, tile)
    n_q, n_k = triton.cdiv(q_length, part_q), triton.cdiv(key.shape[2], part_k)
    out = torch.empty((batch, heads, n_q, n_k), dtype=torch.float32, device=query.device)
    with on_device(query):
        block_mass_fwd_kernel[(n_q, batch * heads)](
            query, key, lse, out, heads, q_length, key.shape[2], n_q, n_k, scale,
            *query.stride()[:3], *key.stride()[:3], *lse.stride(),
            D=head_dim, WIDTH=_width(head_dim), BLOCK_Q=part_q, BLOCK_K=part_k,
            ROWS=max(16, part_q // row_step), ROW_STEP=row_step, UPCAST=_upcast(query),
            num_warps=4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return _join(out, block_q // part_q, block_k // part_k)


def assign_clusters_triton(x: Tensor, centroids: Tensor, bias: Tensor) -> Tensor:
    """A matrix product whose result is only searched for its largest column."""
    batch, heads, length, head_dim = x.shape
    labels = torch.empty((batch, heads, length), dtype=torch.int32, device=x.device)
    tile = TILE_FP32 if x.dtype == torch.float32 else TILE
    centroids = centroids.contiguous()
    with on_device(x):
        assign_clusters_fwd_kernel[(triton.cdiv(length, tile), batch * heads)](
            x, centroids, bias, labels, heads, length, centroids.shape[2],
            *x.stride()[:3], *centroids.stride()[:3], *bias.stride()[:2],
            D=head_dim, WIDTH=_width(head_dim), BLOCK_S=tile, BLOCK_C=tile, UPCAST=_upcast(x),
            num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return labels


def _join(parts: Tensor, by_q: int, by_k: int) -> Tensor:
    """Add up the parts of each block, `[B, H, nQ * by_q, nK * by_k]` with a ragged end."""
    if by_q == by_k == 1:
        return parts
    pad = (0, -parts.shape[3] % by_k, 0, -parts.shape[2] % by_q)
    parts = torch.nn.functional.pad(parts, pad)
    return parts.unflatten(3, (-1, by_k)).sum(4).unflatten(2, (-1, by_q)).sum(3)


def _width(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _upcast(x: Tensor) -> bool:
    """The interpreter computes wrongly in bf16."""
    return interpreted() and x.dtype == torch.bfloat16
