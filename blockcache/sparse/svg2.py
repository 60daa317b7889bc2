"""Sparse-VideoGen 2 (2505.18875): cluster queries and keys by meaning, keep clusters of keys.

Kept: k-means per head on queries and on keys, each cluster made contiguous, the centroid softmax
weighted by cluster sizes, the fewest clusters that reach tau, at least a tenth of them; centroids
carried from step to step, 50 iterations at first and 2 afterwards. Different: evenly spaced tokens
as first centroids, and a fixed number of iterations, so that nothing is read back and results
repeat; any batch size, cond and uncond with a state each; at least 16 tokens per cluster on
average.
"""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from blockcache.kernels.block_scores import Clusters, centroid_scores, kmeans
from blockcache.kernels.select import MassKept, select_blocks
from blockcache.kernels.sparse_attention import SparsePlan
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Positive, Share


@spec
class SVG2(Planner):
    """The fewest clusters of keys whose estimated mass reaches `tau`.

    tau: kept share of the estimated mass. min_ratio: share of the clusters kept at least.
    query_clusters, key_clusters: published 300 and 1000 (Wan), 400 and 1000 (HunyuanVideo), for 75
    to 119 thousand tokens. first, again: k-means iterations without and with earlier centroids.
    """

    tau: Share = 0.9
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    query_clusters: Positive = 300
    key_clusters: Positive = 1000
    first: Positive = 50
    again: Positive = 2
    max_density: Share = 1.0

    card: ClassVar[Card] = Card(
        "2505.18875", "k-means of q and k", "centroids", "A: mass per row", state="centroids"
    )

    def __post_init__(self) -> None:
        """The floor lies below the cap."""
        if self.min_ratio > self.max_density:
            raise ValueError(
                f"min_ratio is {self.min_ratio}, above max_density ({self.max_density})"
            )

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """Cluster, score the centroids, rule A with a floor."""
        queries, keys = self.cluster(q, k, state, context)
        scores = centroid_scores(
            queries.centroids, keys.centroids, scale=context.scale, key_sizes=keys.sizes
        )
        mask = select_blocks(
            scores, MassKept(self.tau), min_ratio=self.min_ratio, max_ratio=self.max_density
        )
        return Decision(pack_clusters(mask, queries, keys))

    def cluster(
        self, q: Tensor, k: Tensor, state: State, context: Context
    ) -> tuple[Clusters, Clusters]:
        """Queries and keys in clusters, going on from the last step's centroids."""
        anew = context.refresh or "q" not in state.tensors
        found = []
        for name, x, wanted in (("q", q, self.query_clusters), ("k", k, self.key_clusters)):
            start = _clusters(wanted, x.shape[2]) if anew else state.tensors[name]
            iterations = self.first if anew else self.again
            made = kmeans(x, start, iterations, layout="BHSD")
            state.tensors[name] = made.centroids
            found.append(made)
        state.refreshed = context.step.index
        return found[0], found[1]

    def state_bytes(
        self, geometry: Geometry, batch: int, heads: int, head_dim: int, itemsize: int
    ) -> int:
        """Both sets of centroids in fp32."""
        wanted = (self.query_clusters, self.key_clusters)
        clusters = sum(_clusters(count, geometry.video) for count in wanted)
        return batch * heads * clusters * head_dim * 4


def _clusters(wanted: int, length: int) -> int:
    return max(1, min(wanted, length // 16))


def pack_clusters(mask: Tensor, queries: Clusters, keys: Clusters) -> SparsePlan:
    """The plan over clusters; `order` is int64 there, and a plan takes that too."""
    return SparsePlan.from_mask(mask, queries.offsets, keys.offsets, queries.order, keys.order)
