"""XAttention (2503.16428): blocks scored along antidiagonals, the fewest kept that reach tau.

Kept: the antidiagonal score of stride 8 and the selection. Different: the last cell repeats its
last token where the published code pads with zeros that take mass; block 0 is not kept by accident
in every row; text is exact, where the code leaves it to the selection; no per-head thresholds from
dynamic programming.
"""

from typing import ClassVar, Literal

from torch import Tensor

from blockcache.kernels.block_scores import antidiagonal_scores
from blockcache.kernels.select import MassKept, select_blocks
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Block, Share, pack
from blockcache.sparse.tilings import frame_major


@spec
class XAttention(Planner):
    """The fewest blocks whose estimated mass reaches `tau` of the row.

    tau: kept share of the estimated mass, useful 0.8 to 0.98; 1 is dense. stride: tokens per
    antidiagonal; planning costs `1 / stride` of half a dense attention, twice. block: tokens per
    block. max_density: most blocks in a row, for a time that does not depend on the content.
    """

    tau: Share = 0.9
    stride: Literal[4, 8, 16] = 8
    block: Block = 128
    max_density: Share = 1.0

    card: ClassVar[Card] = Card("2503.16428", "frame-major", "antidiagonals", "A: mass per row")

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """Antidiagonal scores, then rule A."""
        scores = antidiagonal_scores(
            q, k, stride=self.stride, block_q=self.block, block_k=self.block, scale=context.scale,
            layout="BHSD"
        )  # fmt: skip
        mask = select_blocks(scores, MassKept(self.tau), max_ratio=self.max_density)
        return Decision(pack(mask, frame_major(geometry, self.block)))
