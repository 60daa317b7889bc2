"""What the two methods share that remember the keys which are not attended."""

import dataclasses
from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor

from blockcache.kernels.sparse_attention import SparsePlan, pack_bits, sparse_attention
from blockcache.plan.geometry import Geometry
from blockcache.sparse.base import Card, Context, Partial, Planner
from blockcache.sparse.pieces import bits_bytes


class Remembering(Planner):
    """A planner around another one's plan, which it keeps between refreshes."""


def _plain(planner: Planner) -> Planner:
    if isinstance(planner, Remembering):
        raise ValueError(f"kept is {planner}, which remembers the rest itself; give another one")
    return planner


Kept = Annotated[Planner, AfterValidator(_plain)]
"""The planner whose plan is kept."""


def attend_rest(plan: SparsePlan, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Partial:
    """Output and log-sum-exp over exactly the key blocks that `plan` leaves out.

    Computed, not subtracted: where little is left out, a difference of two outputs is all rounding.
    """
    rest = dataclasses.replace(plan, bits=pack_bits(~plan.mask()))
    output, lse = sparse_attention(
        q, k, v, rest, scale=context.scale, layout="BHSD", return_lse=True, backend=context.backend
    )
    return output, lse


def output_bytes(
    kept: Planner, geometry: Geometry, batch: int, heads: int, head_dim: int, itemsize: int
) -> int:
    """An output, one fp32 number per row, the mask (as of 64-token blocks), and the inner state."""
    rows = batch * heads * geometry.video
    blocks = -(-geometry.video // 64)
    inner = kept.state_bytes(geometry, batch, heads, head_dim, itemsize)
    return rows * (head_dim * itemsize + 4) + bits_bytes(batch * heads, blocks, blocks) + inner


def around(card: Card, kept: Planner) -> Card:
    """The card with the inner planner's choices in it."""
    inner = kept.describe()
    return card._replace(
        layout=inner.layout, score=inner.score, select=inner.select, force=inner.force
    )
