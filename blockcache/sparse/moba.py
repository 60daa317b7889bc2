"""MoBA (2502.13189) with FlashMoBA's findings (2511.11571): queries are routed to chunks of keys.

Kept: the gate `q . mean(chunk)` without softmax, the own chunk first, the top k of all chunks,
exact attention to them. FlashMoBA: small chunks, because the routing's signal to noise falls with
the root of the chunk; its key convolution needs trained weights and is left out. Different: not
causal; the budget is a share of the chunks, so that it does not depend on the length; neighbouring
queries share a decision, by the gate of their mean, because kernels work on rows of queries.
`rows=1` is the paper's routing, query by query: exact, and slow.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator
from torch import Tensor

from blockcache.kernels.block_scores import mean_pool
from blockcache.kernels.select import Count, select_blocks
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Block, Share, count_for, pack, power_of_two
from blockcache.sparse.tilings import Tiling, frame_major


def _rows(value: int) -> int:
    return value if value == 1 else power_of_two(value)


Rows = Annotated[int, AfterValidator(_rows)]
"""Queries that share a decision: 1, or a power of two of at least 16."""


@spec
class MoBA(Planner):
    """The own chunk and the chunks whose mean key the queries like best.

    density: kept share of the chunks, rounded up, the own included. chunk: tokens per chunk. rows:
    queries that share a decision.
    """

    density: Share = 0.25
    chunk: Block = 64
    rows: Rows = 64

    card: ClassVar[Card] = Card(
        "2502.13189, 2511.11571", "frame-major", "q . mean key", "C: count per row", "own chunk"
    )

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """The gate's top chunks."""
        chunks = frame_major(geometry, self.chunk)
        queries = query_rows(chunks, self.rows, geometry.video, q.device)
        own = own_chunks(queries, chunks, geometry.video, q.device)
        gate = gates(q, k, queries, chunks).masked_fill(own, torch.inf)
        mask = select_blocks(gate, Count(count_for(self.density, chunks.count)), forced=own)
        return Decision(pack(mask, queries, chunks))


def query_rows(chunks: Tiling, rows: int, length: int, device: torch.device) -> Tiling:
    """The chunks' order, cut every `rows` queries."""
    count = -(-length // rows)
    if rows > 1:
        return Tiling(chunks.order, rows, (count, 1, 1))
    edges = torch.arange(count + 1, dtype=torch.int32, device=device)[None, None]
    return Tiling(chunks.order, edges, (count, 1, 1))


def own_chunks(queries: Tiling, chunks: Tiling, length: int, device: torch.device) -> Tensor:
    """Which chunks the tokens of each row of queries lie in, bool `[1, 1, nQ, nC]`."""
    (q_first, q_end), (c_first, c_end) = (
        _edges(tiling, length, device) for tiling in (queries, chunks)
    )
    return ((q_first[:, None] < c_end) & (c_first < q_end[:, None]))[None, None]


def gates(q: Tensor, k: Tensor, queries: Tiling, chunks: Tiling) -> Tensor:
    """Mean gate of each row of queries, fp32 `[B, H, nQ, nC]`; by linearity that of their mean."""
    q_mean, k_mean = (
        mean_pool(x, tiling.blocks, order=tiling.order, layout="BHSD").mean
        for x, tiling in ((q, queries), (k, chunks))
    )
    return q_mean @ k_mean.transpose(-1, -2)


def _edges(tiling: Tiling, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First place of each block, and the place behind it."""
    if isinstance(tiling.blocks, Tensor):
        return tiling.blocks[0, 0, :-1], tiling.blocks[0, 0, 1:]
    first = torch.arange(tiling.count, device=device) * tiling.blocks
    return first, (first + tiling.blocks).clamp_max(length)
