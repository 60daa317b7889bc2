"""Sparse-VideoGen (2502.01776): each head is spatial or temporal, found out on a few queries.

Kept: two candidate masks, a band in frame-major order (spatial heads) and the same band in
token-major order (temporal heads), as wide as the density asks; the first frame's columns; the
choice by the smaller error on 64 sampled queries, at every call. Different: the sample is spread
over the whole video instead of its first 10,000 tokens; the masks that are compared are the ones
that are used (the code profiles bands of fixed width); `density` is the kept share of the video's
token pairs.
"""

import functools
import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from blockcache.kernels.block_scores import profile_plans
from blockcache.kernels.sparse_attention import SparsePlan
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Block, Positive, Share, pack
from blockcache.sparse.tilings import frame_major, token_major, token_major_order


@spec
class SVG1(Planner):
    """A band per head, in space or in time.

    density: share of the token pairs inside the band, before its edges are rounded to blocks;
    published 0.2 to 0.3. sink: also keep the first frame's columns (Wan); in token-major order
    these are the frame's first places through all frames, as published. rows: queries tried.
    """

    density: Share = 0.25
    sink: bool = True
    rows: Positive = 64
    block: Block = 128

    card: ClassVar[Card] = Card(
        "2502.01776", "frame- or token-major per head", "error on sampled queries",
        "1 of 2 bands per head", "first frame",
    )  # fmt: skip

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """Try both bands on a few queries, take the better one for each head."""
        candidates = _bands(self, geometry.bare, q.device)
        tried = profile_plans(
            q, k, v, candidates, rows=self.rows, scale=context.scale, layout="BHSD"
        )
        is_temporal = (tried.error[1] < tried.error[0])[..., None]
        plain = torch.arange(geometry.video, dtype=torch.int32, device=q.device)
        order = torch.where(is_temporal, token_major_order(geometry, q.device), plain)
        return Decision(replace(candidates[0], q_order=order, k_order=order))

    def describe(self) -> Card:
        """With or without the first frame."""
        return self.card if self.sink else self.card._replace(force="none")


@functools.lru_cache(maxsize=16)
def _bands(
    planner: SVG1, geometry: Geometry, device: torch.device
) -> tuple[SparsePlan, SparsePlan]:
    """The band in frame-major and in token-major order."""
    tilings = (
        frame_major(geometry, planner.block), token_major(geometry, planner.block, device)
    )  # fmt: skip
    # A band |i - j| <= w leaves out two triangles of side S - w.
    width = geometry.video * (1 - math.sqrt(1 - planner.density))
    places = torch.arange(tilings[0].count, device=device)
    mask = (places[:, None] - places).abs() <= round(width / planner.block)
    if planner.sink:
        mask |= places < -(-geometry.frame // planner.block)
    spatial, temporal = (pack(mask[None, None], tiling) for tiling in tilings)
    return spatial, temporal
