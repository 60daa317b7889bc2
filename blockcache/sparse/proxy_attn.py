"""ProxyAttn (2509.24745): a few pooled heads rank the blocks, each head says how many it needs.

Kept from the abstract, which is all that could be had: heads of a group are averaged to a proxy;
the proxies are scored at fine granularity (here antidiagonals); each head has its own budget (here
the blocks that its own cheap mean-pooled scores need to reach tau, on average over rows). Groups
are neighbouring heads. In video models these may mix spatial and temporal heads; then `heads=1`,
one proxy per head, is the honest choice.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from blockcache.kernels.block_scores import antidiagonal_scores
from blockcache.kernels.select import Count, MassKept, select_blocks
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Block, Positive, Share, mean_scores, pack
from blockcache.sparse.tilings import frame_major


@spec
class ProxyAttn(Planner):
    """The group's ranking, the head's own number of blocks.

    tau: kept share of the estimated mass, which sets a head's number. heads: heads per group.
    stride: tokens per antidiagonal. block: tokens per block.
    """

    tau: Share = 0.9
    heads: Positive = 4
    stride: Literal[4, 8, 16] = 8
    block: Block = 128

    card: ClassVar[Card] = Card(
        "2509.24745", "frame-major", "antidiagonals of pooled heads", "C: count per head"
    )

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """Rank per group, count per head."""
        tiling = frame_major(geometry, self.block)
        ranking = antidiagonal_scores(
            self._proxies(q), self._proxies(k), stride=self.stride, block_q=self.block,
            block_k=self.block, scale=context.scale, layout="BHSD"
        )  # fmt: skip
        own = mean_scores(q, k, tiling, context.scale)
        needed = select_blocks(own, MassKept(self.tau)).sum(-1).float().mean(-1).ceil().int()
        group = torch.arange(q.shape[1], device=q.device) // self.heads
        return Decision(pack(select_blocks(ranking[:, group], Count(needed)), tiling))

    def _proxies(self, x: Tensor) -> Tensor:
        """Means of groups of heads, `[B, ceil(H / heads), S, D]`."""
        groups = [group.float().mean(1) for group in x.split(self.heads, 1)]
        return torch.stack(groups, 1).to(x.dtype)
