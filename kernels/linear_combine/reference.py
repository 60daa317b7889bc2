"""The torch path: defines the result, runs anywhere, quick on small CPU tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_combine_torch(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`base + sum_j weights[j] * tensors[j]`; see `linear_combine` for the contract."""
    lead = tensors[0] if base is None else base
    wide = lead.dtype is torch.float32 or lead.dtype is torch.float64
    acc = _accumulate(tensors, weights, base, lead.dtype if wide else torch.float32)
    if out is not None:
        # Only now, so that out may be one of the inputs.
        return out.copy_(acc)
    return acc if wide else acc.to(lead.dtype)


def _accumulate(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The sum in `dtype`, in fresh memory, one fused multiply-add per tensor."""
    acc = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight == 0.0:
            continue
        if acc is not None:
            acc.add_(tensor, alpha=weight)
        elif base is not None:
            acc = torch.add(base if base.dtype is dtype else base.to(dtype), tensor, alpha=weight)
        elif weight == 1.0:
            acc = tensor.to(dtype, copy=True)
        else:
            acc = torch.mul(tensor if tensor.dtype is dtype else tensor.to(dtype), weight)
    if acc is not None:
        return acc
    if base is not None:
        return base.to(dtype, copy=True)
    return torch.zeros_like(tensors[0], dtype=dtype)


def relative_change_torch(a: Tensor, b: Tensor, step: int = 1) -> Tensor:
    """`(sum |a - b|, sum |b|)` over every `step`-th element of the flattened tensors."""
    if step > 1:
        a, b = a.reshape(-1)[::step], b.reshape(-1)[::step]
    if a.dtype is not torch.float32:
        a = a.float()
    if b.dtype is not torch.float32:
        b = b.float()
    return torch.stack(((a - b).abs_().sum(), b.abs().sum()))
