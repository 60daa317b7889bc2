"""Tensors in a plan's order and back, for backends that cannot read through a table."""

import torch
from torch import Tensor

from .plan import SparsePlan


def in_order(tensor: Tensor, order: Tensor | None) -> Tensor:
    """`[B, H, S, D]` with its tokens in a plan's order, `[B|1, H|1, S]`."""
    if order is None:
        return tensor
    index = order.long().expand(*tensor.shape[:2], -1)
    return tensor.gather(2, index[..., None].expand(-1, -1, -1, tensor.shape[3]))


def all_in_order(
    query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, H, S, D]` as the plan's blocks take them."""
    return (
        in_order(query, plan.q_order), in_order(key, plan.k_order), in_order(value, plan.k_order)
    )  # fmt: skip


def out_of_order(tensor: Tensor, order: Tensor | None) -> Tensor:
    """The inverse, for `[B, H, S, ...]`; the order is a permutation."""
    if order is None:
        return tensor
    index = order.long().expand(*tensor.shape[:2], -1)
    if tensor.dim() == 4:
        index = index[..., None].expand_as(tensor)
    return torch.empty_like(tensor).scatter_(2, index, tensor)
