"""VMoBA (2506.23858): queries are routed to chunks in time, in space and in both, by turns.

Kept: the three kinds of chunk, one per layer in turn; the gate `q . mean(chunk)`; the own chunk;
both selections, a share of the gates (shared out among all queries of a head) and a count per
query. Different: the count is the default, as in the paper's own training-free variant, because the
gates, shifted and scaled to 0..1, are no probabilities; any grid; neighbouring queries share a
decision, as in `moba`; a query never falls back to dense attention.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from blockcache.kernels.select import Count, MassKept, select_blocks
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.moba import Rows, gates, own_chunks, query_rows
from blockcache.sparse.pieces import Box, Positive, Share, count_for, pack
from blockcache.sparse.tilings import tiles


@spec
class VMoBA(Planner):
    """The own chunk and the best by gate, with chunks that change from layer to layer.

    select: "count" keeps `density` of the chunks for each row of queries; "head" takes, over all
    rows of a head, the largest gates until they make up `share`. density: for chunks in time, space
    and both; published 3 of 10, 20 of 130 and 15 of 325. frames: of a chunk in time. patch: height
    and width of a chunk in space. box: of a chunk in both. rows: queries that share a decision.
    """

    select: Literal["count", "head"] = "count"
    density: tuple[Share, Share, Share] = (0.3, 0.16, 0.05)
    share: Share = 0.25
    frames: Positive = 2
    patch: tuple[Positive, Positive] = (3, 4)
    box: Box = (4, 6, 4)
    rows: Rows = 64

    card: ClassVar[Card] = Card(
        "2506.23858", "chunks in time, space, both", "q . mean key", "C: count per row", "own chunk"
    )

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """The gate's top chunks of this layer's kind."""
        kind = context.layer % 3
        chunks = tiles(geometry, self._shape(kind, geometry), q.device)
        queries = query_rows(chunks, self.rows, geometry.video, q.device)
        own = own_chunks(queries, chunks, geometry.video, q.device)
        gate = gates(q, k, queries, chunks)
        if self.select == "head":
            mask = _by_head(gate, own.expand_as(gate), self.share)
        else:
            count = count_for(self.density[kind], chunks.count)
            mask = select_blocks(gate.masked_fill(own, torch.inf), Count(count), forced=own)
        return Decision(pack(mask, queries, chunks))

    def _shape(self, kind: int, geometry: Geometry) -> Box:
        in_time = (self.frames, geometry.height, geometry.width)
        in_space = (geometry.frames, *self.patch)
        return (in_time, in_space, self.box)[kind]

    def describe(self) -> Card:
        """By count or by the head's share."""
        if self.select == "count":
            return self.card
        return self.card._replace(select="A: share of gates per head")


def _by_head(gate: Tensor, own: Tensor, share: float) -> Tensor:
    """The own chunks, and the fewest others with which a head reaches `share` of its gates."""
    flat, mine = gate.flatten(2), own.flatten(2)
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    shares = (flat - low) / (high - low).clamp_min(torch.finfo(flat.dtype).tiny)
    held = shares.masked_fill(~mine, 0.0).sum(-1)
    others = shares.masked_fill(mine, 0.0)
    missing = share * shares.sum(-1) - held
    tau = missing / others.sum(-1).clamp_min(torch.finfo(flat.dtype).tiny)
    # At least one other is taken, however much the own chunks hold.
    rule = MassKept(tau.clamp(1e-12, 1.0))
    return select_blocks(others[:, :, None], rule)[:, :, 0].view_as(own) | own
