"""SVG-EAR (2603.08982): SVG2's clusters; those left out are stood for by their centroid.

Kept: skipped clusters stay in the softmax as one key and one value, weighted by their size; the
kept ones are those whose stand-in would be most wrong per unit of work, within the area that SVG2's
rule would have spent, a reserve by probability first. Different: errors are kept as logarithms of
each row's largest, because they overflow otherwise; of SVG2's changes, all apply. The authors' code
was not to be had; this follows the published formulas and a third-party port.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from blockcache.kernels.block_scores import Clusters, centroid_scores, mean_pool
from blockcache.kernels.common import check_scale
from blockcache.kernels.select import CostGreedy, Count, MassKept, select_blocks
from blockcache.kernels.sparse_attention import Centroids
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, State
from blockcache.sparse.pieces import count_for
from blockcache.sparse.svg2 import SVG2, pack_clusters


@spec
class SvgEar(SVG2):
    """Exact attention where centroids would be most wrong, centroids elsewhere.

    gamma: exponent of the cost (query tokens x key tokens) that an error is divided by; 0 ranks by
    error alone. The other parameters are SVG2's: `tau` and `min_ratio` set the budget.
    """

    gamma: Annotated[float, Field(ge=0, le=4)] = 1.0

    card: ClassVar[Card] = Card(
        "2603.08982", "k-means of q and k", "error of centroids", "D: greedy within SVG2's area",
        "most probable clusters", "centroids", "centroids",
    )  # fmt: skip

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """Cluster, probe the error of every stand-in, spend SVG2's area on the worst."""
        queries, keys = self.cluster(q, k, state, context)
        values = mean_pool(v, keys.offsets, order=keys.order, layout="BHSD").mean
        probability = centroid_scores(
            queries.centroids, keys.centroids, scale=context.scale, key_sizes=keys.sizes
        )
        errors = surrogate_log_errors(
            queries.centroids, k, v, keys, values, check_scale(context.scale, q.shape[3])
        )
        mask = self._spend(probability, errors, keys.sizes)
        stand_ins = Centroids(keys.centroids.to(k.dtype), values.to(v.dtype), keys.sizes)
        return Decision(pack_clusters(mask, queries, keys), centroids=stand_ins)

    def _spend(self, probability: Tensor, errors: Tensor, sizes: Tensor) -> Tensor:
        """The reserve, and greedily the rest of the tokens that SVG2 would have attended."""
        blocks = probability.shape[3]
        tokens = sizes[:, :, None].double()
        by_mass = select_blocks(
            probability, MassKept(self.tau), min_ratio=min(self.max_density, 2 * self.min_ratio),
            max_ratio=self.max_density,
        )  # fmt: skip
        budget = (by_mass * tokens).sum(-1)
        reserve = select_blocks(probability, Count(count_for(self.min_ratio, blocks)))
        left = (budget - (reserve * tokens).sum(-1)).clamp_min(0)
        # Rule D ranks by score per cost; in logarithms that quotient is this difference. The number
        # of queries is the same for a whole row.
        rank = (errors.double() - self.gamma * tokens.log()).masked_fill(reserve, -torch.inf)
        rule = CostGreedy(tokens, left)
        return select_blocks(rank * tokens, rule, min_blocks=0, backend="torch") | reserve


def surrogate_log_errors(
    query_means: Tensor, k: Tensor, v: Tensor, keys: Clusters, values: Tensor, scale: float
) -> Tensor:
    """How wrong each cluster's stand-in is for each query centroid, fp32 `[B, H, Cq, Ck]`.

    The logarithm of `sum_t |exp(q . k_t) v_t - exp(q . kbar) vbar|^2` over the tokens of a cluster,
    short of a constant per row. One head at a time: the probe is `Cq x S`.
    """
    errors = torch.empty(
        *query_means.shape[:3], keys.centroids.shape[2], dtype=torch.float32, device=k.device
    )
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            label = keys.labels[b, h].long()
            key, value, mean = k[b, h].float(), v[b, h].float(), values[b, h]
            logits = query_means[b, h] @ key.T * scale
            stand_in = query_means[b, h] @ keys.centroids[b, h].T * scale
            largest = logits.amax(-1, keepdim=True)
            weight, other = (logits - largest).exp(), (stand_in - largest).exp()
            zero = torch.zeros_like(other)
            squares = zero.index_add(1, label, weight.square() * value.square().sum(-1))
            crossed = zero.index_add(1, label, weight * (value * mean[label]).sum(-1))
            constant = keys.sizes[b, h] * mean.square().sum(-1)
            error = squares - 2 * other * crossed + other.square() * constant
            errors[b, h] = error.clamp_min(0).log()
    return errors
