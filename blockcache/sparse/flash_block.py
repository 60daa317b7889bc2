"""FlashBlock (2602.05305): attention to what lies outside changes little, so remember and merge it.

Kept: output and log-sum-exp of the outside part are computed at a refresh, remembered, and merged
exactly with a freshly computed inside part. Different: the paper is about block diffusion, where
outside is the context before the current block; a video that is denoised as a whole has no such
block, so inside is what another planner chooses at the refresh, and outside all the rest. There is
no count of changed tokens either: a refresh comes every few steps. Unlike in Re-ttention the split
between inside and outside follows the fresh logits.
"""

from typing import ClassVar

from torch import Tensor

from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, State
from blockcache.sparse.cubes import Cubes
from blockcache.sparse.pieces import Positive
from blockcache.sparse.remainder import Kept, Remembering, around, attend_rest, output_bytes


@spec
class FlashBlock(Remembering):
    """The chosen blocks fresh, all others from the last refresh.

    kept: chooses, at each refresh, the blocks that are computed in every step. every: steps between
    refreshes; 1 computes everything always.
    """

    kept: Kept = Cubes(centroids=False)
    every: Positive = 5

    card: ClassVar[Card] = Card(
        "2602.05305", "", "", "", remainder="output and LSE", state="output, LSE, mask"
    )

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """The kept blocks; at a refresh the others too, once."""
        held = state.tensors
        due = state.is_due(self.every, context)
        if due or state.plan is None:
            chosen = self.kept.plan(q, k, v, geometry, state.nested(), context)
            if chosen.plan is None:
                return chosen
            output, held["lse"] = attend_rest(chosen.plan, q, k, v, context)
            held["output"] = output
            state.plan, state.refreshed = chosen.plan, context.step.index
        return Decision(state.plan, initial=(held["output"], held["lse"]), refreshed=due)

    def state_bytes(
        self, geometry: Geometry, batch: int, heads: int, head_dim: int, itemsize: int
    ) -> int:
        """As much as the output, the log-sum-exp in fp32, and the mask."""
        return output_bytes(self.kept, geometry, batch, heads, head_dim, itemsize)

    def describe(self) -> Card:
        """What is kept is the inner planner's choice."""
        return around(self.card, self.kept)
