"""The torch path: one sort per row."""

import torch
from torch import Tensor


def select_blocks_torch(
    ranked_by: Tensor, count: Tensor, forced: Tensor | None, least: int, most: int
) -> Tensor:
    """Keep the first `count` blocks of each row's ranking, within limits, and the forced ones.

    Args:
        ranked_by: `[B, H, nQ, nK]`.
        count: int64 `[B, H, nQ]`.
        forced: bool `[B, H, nQ, nK]` or None.
        least: Lower limit on the count.
        most: Upper limit on kept blocks; forced ones count first.
    """
    count = count.clamp(least, most)[..., None]
    rank = _rank(ranked_by)
    if forced is None:
        return rank < count
    chosen = ((rank < count) & ~forced).sum(-1, keepdim=True)
    room = (most - forced.sum(-1, keepdim=True)).clamp_min(0)
    rank_of_rest = _rank(ranked_by.masked_fill(forced, -torch.inf), last=forced)
    return forced | (rank_of_rest < torch.minimum(chosen, room))


def count_by_mass(scores: Tensor, tau: Tensor, crossing_kept: bool) -> Tensor:
    """How many of the largest blocks rules A (`crossing_kept`) and B keep, int64 `[B, H, nQ]`."""
    # In fp64, so that where a row crosses tau does not depend on its length.
    mass = scores.double().clamp_min(0.0).sort(-1, descending=True).values
    behind = mass.cumsum(-1)
    share = tau.double()[:, :, None, None]
    limit = share * behind[..., -1:]
    if not crossing_kept:
        return (behind <= limit).sum(-1).clamp_min(1)
    kept = (behind - mass < limit) | (share >= 1)
    return kept.sum(-1)


def count_by_cost(scores: Tensor, cost: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Score per cost to rank by, and how many blocks begin within the budget (rule D)."""
    # A block without tokens costs nothing and is worth nothing.
    value = torch.where(cost > 0, scores / cost, -torch.inf)
    order = value.sort(dim=-1, descending=True, stable=True).indices
    spent = cost.double().gather(-1, order)
    before = spent.cumsum(-1) - spent
    return value, (before < budget.double()[..., None]).sum(-1)


def _rank(values: Tensor, last: Tensor | None = None) -> Tensor:
    """Place of each entry in its row, descending; equal ones in ascending column order."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    if last is not None:
        # Even behind others of value -inf.
        behind = last.gather(-1, order).sort(dim=-1, stable=True).indices
        order = order.gather(-1, behind)
    places = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
