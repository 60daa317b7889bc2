"""Cubes: block means score, block means stand in. Our own combination, no paper's method.

Tokens are read cube by cube, so that a block is a small piece of space and time. Each query block
attends exactly to the key blocks whose means it likes best, and every other block is represented by
one key and one value, its means, in the same softmax (the compensation of SVG-EAR, 2603.08982,
without its clusters). Nothing is remembered between steps, and planning reads q, k and v once.

With `centroids=False` it is Video Sparse Attention (2505.13389) without its trained branch.
"""

from typing import ClassVar

from torch import Tensor

from blockcache.kernels.block_scores import centroid_scores
from blockcache.kernels.select import MassKept, select_blocks
from blockcache.kernels.sparse_attention import Centroids
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Box, Share, block_means, pack, share_for
from blockcache.sparse.tilings import tiles


@spec
class Cubes(Planner):
    """Keep a share of all cubes, let block means stand for the others.

    density: kept share of the cubes of all heads together; useful 0.1 to 0.4. Where attention is
    spread out more are kept, where it is not fewer. cube: frames, height and width of a cube; 64
    tokens in all is what kernels like, 32 is more precise. centroids: let block means stand for
    what is left out.
    """

    density: Share = 0.25
    cube: Box = (4, 4, 4)
    centroids: bool = True

    card: ClassVar[Card] = Card(
        "ours", "cubes", "block means", "A: mass, one tau for the density", remainder="block means"
    )

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """Rank cubes by the softmax between means, keep the share of mass that the density buys."""
        tiling = tiles(geometry, self.cube, q.device)
        queries, _ = block_means(q, tiling)
        keys, sizes = block_means(k, tiling)
        scores = centroid_scores(queries, keys, scale=context.scale, key_sizes=sizes)
        tau = share_for(scores, self.density) if self.density < 1 else 1.0
        mask = select_blocks(scores, MassKept(tau))
        stand_ins = None
        if self.centroids and self.density < 1:
            values, _ = block_means(v, tiling)
            stand_ins = Centroids(keys.to(k.dtype), values.to(v.dtype), sizes)
        return Decision(pack(mask, tiling), centroids=stand_ins)

    def describe(self) -> Card:
        """Without centroids the rest is dropped."""
        return self.card if self.centroids else self.card._replace(remainder="dropped")
