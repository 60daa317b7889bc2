"""SpargeAttn's selection (2502.18137): mean-pooled scores where a block's tokens are alike.

Kept: a block is judged by its mean only if the mean cosine between its tokens exceeds a threshold;
unreliable key blocks are attended by all and unreliable query blocks attend everything; top-k or
cumulative mass that leaves out the crossing block. Different: no int8 products and no skipping of
PV products inside the kernel (both change numbers beyond the plan); a short last block is pooled
over its real tokens instead of always being dense; no tuned thresholds per layer, no Hilbert order.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from blockcache.kernels.block_scores import centroid_scores, mean_pool
from blockcache.kernels.select import Count, MassBelow, select_blocks
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Block, Share, pack
from blockcache.sparse.tilings import frame_major


@spec
class Sparge(Planner):
    """Pooled scores for blocks of similar tokens, everything for the others.

    select: "count" keeps a share of the blocks of each row, "mass" those within a share of the
    softmax mass. amount: that share; published 0.5 for "count" and 0.98 for "mass". similarity:
    mean cosine, -1 to 1, above which a block is judged by its mean; published -0.1 and 0.6.
    """

    select: Literal["count", "mass"] = "count"
    amount: Share = 0.5
    similarity: Annotated[float, Field(ge=-1, le=1)] = -0.1
    block_q: Block = 128
    block_k: Block = 64

    card: ClassVar[Card] = Card(
        "2502.18137", "frame-major", "block means of similar tokens", "C: count per row",
        "unreliable blocks",
    )  # fmt: skip

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """Scores between reliable means, rule B or C, unreliable rows and columns forced."""
        queries, keys = (
            mean_pool(x, block, with_similarity=True, layout="BHSD")
            for x, block in ((q, self.block_q), (k, self.block_k))
        )
        doubtful_q, doubtful_k = (
            torch.zeros_like(p.sizes) if p.similarity is None else p.similarity <= self.similarity
            for p in (queries, keys)
        )
        scores = centroid_scores(
            queries.mean, keys.mean, scale=context.scale, key_sizes=(~doubtful_k).int()
        )
        forced = doubtful_q[..., None] | doubtful_k[:, :, None]
        mask = select_blocks(scores, self._rule(scores.shape[3]), forced=forced)
        tiling = frame_major(geometry, self.block_q), frame_major(geometry, self.block_k)
        return Decision(pack(mask, *tiling))

    def _rule(self, blocks: int) -> Count | MassBelow:
        if self.select == "mass":
            return MassBelow(self.amount)
        return Count(max(1, int(self.amount * blocks)))

    def describe(self) -> Card:
        """By count or by mass."""
        return self.card if self.select == "count" else self.card._replace(select="B: mass per row")
