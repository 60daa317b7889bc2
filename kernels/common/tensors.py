"""Checks and views shared by everything that takes queries, keys and values."""

import math

import torch
from torch import Tensor

LAYOUTS = ("BSHD", "BHSD")


def check_qkv(
    query: Tensor, key: Tensor, value: Tensor, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors as `[B, H, S, D]` views whose last stride is 1."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; it must be a "
                f"4-D {query.dtype} tensor on {query.device}, in layout {layout}."
            )
    if not query.is_floating_point():
        raise ValueError(f"query is {query.dtype}; supported are floating-point tensors.")
    q, k, v = (to_heads_first(t, layout) for t in (query, key, value))
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            f"must agree in batch, heads and head dimension ({layout}), "
            "key and value in length too."
        )
    return q, k, v


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the logits."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not scale > 0 or math.isinf(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number above 0.")
    return float(scale)


def check_lengths(key_lengths: Tensor | None, q: Tensor) -> None:
    """Refuse key lengths that are not one integer per batch entry on the query's device."""
    if key_lengths is None:
        return
    fits = key_lengths.shape == q.shape[:1] and key_lengths.device == q.device
    if not fits or key_lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"key_lengths is {key_lengths.dtype} {tuple(key_lengths.shape)} on "
            f"{key_lengths.device}; it must be int32 or int64 [{q.shape[0]}] on {q.device}."
        )


def to_heads_first(tensor: Tensor, layout: str) -> Tensor:
    """A view `[B, H, S, D]` whose last stride is 1; copies only where that cannot be had."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; supported are {', '.join(LAYOUTS)}.")
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    return tensor.transpose(1, 2) if layout == "BSHD" else tensor


def allocate(q: Tensor, layout: str, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Room for the output, contiguous in `layout` and viewed as `[B, H, S, D]`, and for the LSE."""
    batch, heads, length, head_dim = q.shape
    if layout == "BSHD":
        output = q.new_empty((batch, length, heads, head_dim)).transpose(1, 2)
    else:
        output = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, length), dtype=torch.float32) if return_lse else None
    return output, lse


def as_layout(output: Tensor, lse: Tensor | None, layout: str) -> Tensor | tuple[Tensor, Tensor]:
    """What the caller gets, from `[B, H, S, D]` and the LSE."""
    output = output.transpose(1, 2) if layout == "BSHD" else output
    return output if lse is None else (output, lse)
