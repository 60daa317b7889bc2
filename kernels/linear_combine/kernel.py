"""One pass over memory for `linear_combine` and for `relative_change`."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import on_device

BLOCK = 2048
# Enough programs to fill a large GPU a few times over, few enough that summing them is free.
MAX_PARTIALS = 1024


@triton.jit
def linear_combine_fwd_kernel(
    base,
    y0,
    y1,
    y2,
    y3,
    out,
    w0,
    w1,
    w2,
    w3,
    numel,
    COUNT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One stretch of memory: the weighted sum, in fp32, rounded once."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < numel
    # [BLOCK]
    b_acc = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_BASE:
        b_acc += tl.load(base + o_n, mask=m_n, other=0.0).to(tl.float32)
    if COUNT > 0:
        b_acc += w0 * tl.load(y0 + o_n, mask=m_n, other=0.0).to(tl.float32)
    if COUNT > 1:
        b_acc += w1 * tl.load(y1 + o_n, mask=m_n, other=0.0).to(tl.float32)
    if COUNT > 2:
        b_acc += w2 * tl.load(y2 + o_n, mask=m_n, other=0.0).to(tl.float32)
    if COUNT > 3:
        b_acc += w3 * tl.load(y3 + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(out + o_n, b_acc.to(out.dtype.element_ty), mask=m_n)


@triton.jit
def relative_change_fwd_kernel(
    a,
    b,
    partials,
    count,
    step,
    rounds,
    BLOCK: tl.constexpr,
):
    """Some stretches of memory: both sums."""
    i_p = tl.program_id(0).to(tl.int64)
    # [BLOCK], kept apart until the end so that the additions stay a tree
    b_diff = tl.zeros([BLOCK], dtype=tl.float32)
    b_size = tl.zeros([BLOCK], dtype=tl.float32)
    for i_r in range(rounds):
        o_n = (i_p * rounds + i_r) * BLOCK + tl.arange(0, BLOCK)
        m_n = o_n < count
        b_a = tl.load(a + o_n * step, mask=m_n, other=0.0).to(tl.float32)
        b_b = tl.load(b + o_n * step, mask=m_n, other=0.0).to(tl.float32)
        b_diff += tl.abs(b_a - b_b)
        b_size += tl.abs(b_b)
    tl.store(partials + 2 * i_p, tl.sum(b_diff, axis=0))
    tl.store(partials + 2 * i_p + 1, tl.sum(b_size, axis=0))


def linear_combine_triton(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Launch the fused sum; inputs are contiguous and of 1 to 4 tensors, as the api checked."""
    lead = tensors[0] if base is None else base
    if out is None:
        out = torch.empty_like(lead)
    used = [(t, float(w)) for t, w in zip(tensors, weights, strict=True) if w != 0.0]
    # Pointers of absent terms are never read; they only have to be something.
    y = [t for t, _ in used] + [lead] * (4 - len(used))
    w = [w for _, w in used] + [0.0] * (4 - len(used))
    numel = out.numel()
    if numel:
        with on_device(lead):
            linear_combine_fwd_kernel[(triton.cdiv(numel, BLOCK),)](
                lead if base is None else base,
                *y,
                out,
                *w,
                numel,
                COUNT=len(used),
                HAS_BASE=base is not None,
                BLOCK=BLOCK,
                enable_fp_fusion=True,
            )
    return out


def relative_change_triton(a: Tensor, b: Tensor, step: int) -> Tensor:
    """Launch the one-pass difference; per-program sums keep the result reproducible."""
    count = triton.cdiv(a.numel(), step)
    rounds = max(1, triton.cdiv(count, BLOCK * MAX_PARTIALS))
    programs = max(1, triton.cdiv(count, BLOCK * rounds))
    partials = torch.empty((programs, 2), dtype=torch.float32, device=a.device)
    with on_device(a):
        relative_change_fwd_kernel[(programs,)](
            a, b, partials, count, step, rounds, BLOCK=BLOCK, enable_fp_fusion=True
        )
    return partials.sum(0)
