"""Try candidate plans on a few queries: SVG1 (2502.01776) picks each head's mask that way."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import check_qkv, check_scale, needs_grad
from ..sparse_attention import SparsePlan
from ..sparse_attention.reference import token_mask


class Profile(NamedTuple):
    """What candidate plans lose on the sampled queries, per head.

    error: fp32 `[n, B, H]`, mean squared difference to dense output. recall: fp32 `[n, B, H]`,
    mean attention mass that the plan keeps, 1 for all.
    """

    error: Tensor
    recall: Tensor


def profile_plans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plans: Sequence[SparsePlan],
    *,
    rows: int = 64,
    scale: float | None = None,
    layout: str = "BSHD",
) -> Profile:
    """Compare the output under each plan with dense output, on sampled queries.

    The sample is evenly spaced with an offset that keeps clear of block edges, the same on every
    call. The published code samples the first 10,000 tokens only, about three frames of a video.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, H, D]`.
        value: `[B, Sk, H, D]`.
        plans: Candidates, at least one.
        rows: Queries to try; costs `rows / Sq` of dense attention, and as much memory as their
            scores.
        scale: Factor on the logits, above 0; None is `1 / sqrt(D)`.
        layout: "BSHD" or "BHSD".

    Raises:
        ValueError: No plans, no rows, shapes that do not fit, or a needed gradient.
    """
    q, k, v = check_qkv(query, key, value, layout)
    scale = check_scale(scale, q.shape[3])
    if not plans or rows < 1:
        raise ValueError(f"got {len(plans)} plans and {rows} rows; both must be at least 1.")
    if needs_grad(q, k, v):
        raise ValueError(
            "profile_plans has no backward pass and a gradient is needed; call it under "
            "torch.no_grad()."
        )
    rows = min(rows, q.shape[2])
    sample = (torch.arange(rows, device=q.device) * q.shape[2] + q.shape[2] // 2) // rows
    logits = (q[:, :, sample].float() @ k.float().transpose(-1, -2)) * scale
    weights = logits.softmax(-1)
    dense = weights @ v.float()
    errors, recalls = [], []
    for plan in plans:
        allowed = token_mask(plan, q.shape[0], q.shape[1], q.shape[2], k.shape[2], sample)
        kept = weights.masked_fill(~allowed, 0.0)
        mass = kept.sum(-1, keepdim=True)
        output = (kept @ v.float()) / mass.clamp_min(torch.finfo(torch.float32).tiny)
        errors.append((output - dense).square().mean((-1, -2)))
        recalls.append(mass.mean((-1, -2)))
    return Profile(torch.stack(errors), torch.stack(recalls))
