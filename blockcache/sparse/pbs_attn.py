"""PBS-Attn (2510.21270): sort keys by importance, so that the important ones share blocks.

Kept: keys and values of each segment in descending order of the attention that probe queries pay
them, queries where they are; mean-pooled scores; the own segment outside the softmax and always
attended; the fewest blocks that reach tau; block 0 always. Different: the paper is about causal
language models and probes with the last 128 queries; a video has no last block that would speak for
all, so the probes are spread over it.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from blockcache.kernels.block_scores import centroid_scores, mean_pool
from blockcache.kernels.common import check_scale
from blockcache.kernels.select import MassKept, select_blocks
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Block, Positive, Share, pack
from blockcache.sparse.tilings import Tiling, frame_major


@spec
class PbsAttn(Planner):
    """Mean-pooled selection over sorted keys.

    tau: kept share of the estimated mass. segment: tokens inside which keys are sorted, a multiple
    of the block, published 256; 0 is the whole video. probes: queries that judge the keys.
    """

    tau: Share = 0.9
    segment: Annotated[int, Field(ge=0, le=10**9)] = 256
    probes: Positive = 128
    block: Block = 128
    max_density: Share = 1.0

    card: ClassVar[Card] = Card(
        "2510.21270",
        "keys by importance",
        "block means",
        "A: mass per row",
        "own segment, first block",
    )

    def __post_init__(self) -> None:
        """Blocks lie inside segments."""
        if self.segment % self.block:
            raise ValueError(
                f"segment is {self.segment}; it must be a multiple of the block ({self.block})"
            )

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """Sort the keys, score the blocks of the sorted keys, rule A."""
        order = self._order(q, k, check_scale(context.scale, q.shape[3]))
        tiling = frame_major(geometry, self.block)
        sorted_keys = Tiling(order, self.block, tiling.grid)
        queries = mean_pool(q, self.block, layout="BHSD")
        keys = mean_pool(k, self.block, order=order, layout="BHSD")
        scores = centroid_scores(queries.mean, keys.mean, scale=context.scale, key_sizes=keys.sizes)
        places = torch.arange(tiling.count, device=q.device)
        own = torch.zeros(tiling.count, tiling.count, dtype=torch.bool, device=q.device)
        if self.segment:
            segments = places * self.block // self.segment
            own = segments[:, None] == segments
        mask = select_blocks(
            scores.masked_fill(own, 0.0), MassKept(self.tau), forced=own | (places == 0),
            max_ratio=self.max_density,
        )  # fmt: skip
        return Decision(pack(mask, tiling, sorted_keys))

    def _order(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Keys by falling importance inside their segments, int32 `[B, H, S]`."""
        length = q.shape[2]
        probes = min(self.probes, length)
        rows = (torch.arange(probes, device=q.device) * length + length // 2) // probes
        importance = torch.stack(
            [
                ((q[:, h, rows].float() @ k[:, h].float().transpose(1, 2)) * scale)
                .softmax(-1)
                .mean(1)
                for h in range(q.shape[1])
            ],
            1,
        )
        order = importance.argsort(dim=-1, descending=True, stable=True)
        if self.segment:
            segments = torch.arange(length, device=q.device) // self.segment
            order = order.gather(-1, segments[order].argsort(dim=-1, stable=True))
        return order.to(torch.int32)

    def describe(self) -> Card:
        """Without segments there is no own one."""
        return self.card if self.segment else self.card._replace(force="first block")
