"""`sparse_attention`: checks, layout, and the choice of backend."""

from typing import Any

import torch
from torch import Tensor

from ..common import (
    allocate,
    as_layout,
    check_lengths,
    check_qkv,
    check_scale,
    needs_grad,
    pick_backend,
    to_heads_first,
)
from .on_request import ON_REQUEST, objection_of
from .plan import Centroids, SparsePlan


def is_supported(
    backend: str,
    query: Tensor,
    plan: SparsePlan,
    *,
    layout: str = "BSHD",
    return_lse: bool = False,
    initial: tuple[Tensor, Tensor] | None = None,
    centroids: Centroids | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[bool, str]:
    """Whether `sparse_attention` would take this call with this backend, and if not, why.

    Args:
        backend: "torch", "triton", "flex", "flashinfer" or "sparge".
        query: As for `sparse_attention`, and so is the rest.
        plan: Chosen blocks.
        layout: "BSHD" or "BHSD".
        return_lse: Whether the log-sum-exp is asked for.
        initial: Earlier result, if any.
        centroids: Stand-ins, if any.
        key_lengths: Lengths, if any.
    """
    extras = {
        "return_lse": return_lse, "initial": initial, "centroids": centroids,
        "key_lengths": key_lengths,
    }  # fmt: skip
    if backend in ON_REQUEST:
        reason = objection_of(backend, to_heads_first(query, layout), plan, extras)
        return not reason, reason
    try:
        pick_backend(backend, query)
    except ValueError as error:
        return False, str(error)
    return True, ""


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SparsePlan,
    *,
    scale: float | None = None,
    layout: str = "BSHD",
    return_lse: bool = False,
    initial: tuple[Tensor, Tensor] | None = None,
    centroids: Centroids | None = None,
    key_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend exactly to the key blocks that `plan` chose, without computing the others.

    A query that attends nothing gets output 0 and LSE -inf.

    Args:
        query: `[B, Sq, H, D]`, fp32, fp16 or bf16. The Triton backend takes D up to 128.
        key: `[B, Sk, H, D]`, same dtype and device.
        value: `[B, Sk, H, D]`.
        plan: Chosen blocks, on the same device.
        scale: Factor on the logits, above 0; None is `1 / sqrt(D)`.
        layout: "BSHD", or "BHSD" for tensors `[B, H, S, D]`.
        return_lse: Also return the log-sum-exp of the logits, natural logarithm, fp32 `[B, H, Sq]`.
        initial: Earlier `(output, LSE)` over other keys, merged exactly into the result; the output
            in `layout`, the LSE `[B, H, Sq]`.
        centroids: Stand-ins `[B, H, nK, D]` for the blocks that were not chosen.
        key_lengths: int32 or int64 `[B]`; keys at and after this position are left out.
        backend: "torch", "triton" or None for the best of these that can run here. Only on request
            "flex" (torch's compiled flex_attention), "flashinfer" (FlashInfer) and "sparge"
            (SpargeAttn, in int8 and fp8), whose limits `is_supported` names.

    Returns:
        The output in `layout` and the query's dtype; with `return_lse` a pair.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, a plan for other lengths, a needed
            gradient (inference only), or a backend that cannot run.
    """
    q, k, v = check_qkv(query, key, value, layout)
    scale = check_scale(scale, q.shape[3])
    _check_plan(plan, q, k)
    if initial is not None:
        initial = (to_heads_first(initial[0], layout), initial[1])
        _check_initial(initial, q)
    if centroids is not None:
        _check_centroids(centroids, plan, q)
    check_lengths(key_lengths, q)
    extras = (*(initial or ()), *((centroids.key, centroids.value) if centroids else ()))
    if needs_grad(query, key, value, *extras):
        raise ValueError(
            "sparse_attention has no backward pass and a gradient is needed; call it under "
            "torch.no_grad(), or use dense attention for training."
        )
    options: dict[str, Any] = {
        "initial": initial,
        "centroids": centroids,
        "key_lengths": key_lengths,
    }
    if backend in ON_REQUEST:
        extras_asked = options | {"return_lse": return_lse}
        reason = objection_of(backend, q, plan, extras_asked)
        if reason:
            raise ValueError(f"backend={backend!r} was asked for: {reason}. Use backend=None.")
        taken = {name: extras_asked[name] for name in ON_REQUEST[backend].extras}
        output, lse = ON_REQUEST[backend].attend(q, k, v, plan, scale, **taken)
        return as_layout(output, lse, layout)
    if pick_backend(backend, q) == "triton":
        from .kernel import sparse_attention_triton

        output, lse = allocate(q, layout, return_lse)
        sparse_attention_triton(q, k, v, output, lse, plan, scale, **options)
    else:
        from .gather import sparse_attention_torch

        output, lse = sparse_attention_torch(q, k, v, plan, scale, return_lse, **options)
    return as_layout(output, lse, layout)


def _check_plan(plan: SparsePlan, q: Tensor, k: Tensor) -> None:
    if plan.bits.device != q.device:
        raise ValueError(
            f"the plan is on {plan.bits.device}, query on {q.device}; move the plan or plan there."
        )
    listed = k.shape[2] if plan.k_order is None else plan.k_order.shape[2]
    sides = (
        ("q", plan.q_blocks, plan.num_q_blocks, q.shape[2]),
        ("k", plan.k_blocks, plan.num_k_blocks, listed),
    )
    for side, blocks, count, length in sides:
        if isinstance(blocks, int) and count != -(-length // blocks):
            raise ValueError(
                f"the plan has {count} {side} blocks of {blocks} tokens; a length of {length} "
                f"needs {-(-length // blocks)}. Make a plan for this length."
            )
    if plan.q_order is not None and plan.q_order.shape[2] != q.shape[2]:
        raise ValueError(
            f"plan.q_order lists {plan.q_order.shape[2]} tokens, query has {q.shape[2]}; "
            "it must be a permutation of them."
        )
    tables = (plan.bits, plan.q_blocks, plan.k_blocks, plan.q_order, plan.k_order)
    for table in tables:
        if isinstance(table, Tensor):
            _check_leading(tuple(table.shape), q)


def _check_leading(shape: tuple[int, ...], q: Tensor) -> None:
    if shape[0] not in (1, q.shape[0]) or shape[1] not in (1, q.shape[1]):
        raise ValueError(
            f"a table of the plan is {shape}; its first two sizes must be 1 or the batch and heads "
            f"{tuple(q.shape[:2])}."
        )


def _check_initial(initial: tuple[Tensor, Tensor], q: Tensor) -> None:
    output, lse = initial
    if output.shape != q.shape or lse.shape != q.shape[:3] or lse.dtype != torch.float32:
        raise ValueError(
            f"initial is {tuple(output.shape)} and {lse.dtype} {tuple(lse.shape)} (heads first); "
            f"it must be {tuple(q.shape)} and float32 {tuple(q.shape[:3])}."
        )
    if output.device != q.device or lse.device != q.device:
        raise ValueError(f"initial is on {output.device} and {lse.device}; query is on {q.device}.")


def _check_centroids(centroids: Centroids, plan: SparsePlan, q: Tensor) -> None:
    shape = (q.shape[0], q.shape[1], plan.num_k_blocks, q.shape[3])
    for name, tensor in (("key", centroids.key), ("value", centroids.value)):
        fits = tuple(tensor.shape) == shape and tensor.dtype == q.dtype
        if not fits or tensor.device != q.device or tensor.stride(-1) != 1:
            raise ValueError(
                f"centroids.{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; it "
                f"must be {q.dtype} {shape} on {q.device} with last stride 1."
            )
    counts = centroids.counts
    if counts.dim() != 3 or counts.shape[2] != plan.num_k_blocks or counts.device != q.device:
        raise ValueError(
            f"centroids.counts is {tuple(counts.shape)} on {counts.device}; it must be "
            f"[B|1, H|1, {plan.num_k_blocks}] on {q.device}."
        )
    _check_leading(tuple(counts.shape), q)
