"""NABLA (2507.13546): softmax of mean-pooled 8 x 8 patches, thresholded, and an STA window.

Kept: patches of 64 tokens inside a frame, the scores, the selection, the window that is cut off at
the borders. Different: sides need not be multiples of the patch (a patch at the edge is smaller,
its mean is over its real tokens, and it weighs as many); tokens are read in patch order by the
kernel instead of being permuted in the model.
"""

from typing import ClassVar

from torch import Tensor

from blockcache.kernels.select import MassKept, select_blocks
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Box, Share, mean_scores, pack, window
from blockcache.sparse.tilings import tiles


@spec
class Nabla(Planner):
    """The fewest patches whose softmax mass reaches `tau`, and those in the window.

    tau: kept share of the estimated mass, useful 0.4 (finetuned models) to 0.95. sta: frames,
    height and width of the window in patches, for example (11, 3, 3); None for no window. patch:
    side of a patch in tokens.
    """

    tau: Share = 0.9
    sta: Box | None = None
    patch: int = 8
    max_density: Share = 1.0

    card: ClassVar[Card] = Card("2507.13546", "patches", "block means", "A: mass per row")

    def __post_init__(self) -> None:
        """A patch is a square of at least two tokens a side."""
        if not 2 <= self.patch <= 64:
            raise ValueError(f"patch is {self.patch}; it must be from 2 to 64 tokens a side")

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """Mean-pooled scores, rule A, window."""
        tiling = tiles(geometry, (1, self.patch, self.patch), q.device)
        scores = mean_scores(q, k, tiling, context.scale)
        rule = MassKept(self.tau)
        forced = None if self.sta is None else window(tiling, self.sta, q.device, clamped=False)
        mask = select_blocks(scores, rule, forced=forced, max_ratio=self.max_density)
        return Decision(pack(mask, tiling))

    def describe(self) -> Card:
        """With the window, if there is one."""
        return self.card if self.sta is None else self.card._replace(force="STA window, cut off")
