"""k-means over tokens, per head: SVG2 (2505.18875), SVG-EAR (2603.08982).

Kept: Euclidean assignment, warm start from earlier centroids, few iterations. Different: the
number of iterations is fixed, so that nothing is read back to the host; means are taken over
sorted tokens without atomics, so that results repeat bit for bit on one device; an empty cluster
keeps its centroid.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import needs_grad, pick_backend, to_heads_first
from .api import mean_pool


class Clusters(NamedTuple):
    """Tokens in clusters, in the form that `SparsePlan` takes.

    order: int64 `[B, H, S]`, tokens sorted by cluster. offsets: int32 `[B, H, C + 1]`. centroids:
    fp32 `[B, H, C, D]`, the means of exactly these clusters. sizes: int32 `[B, H, C]`. labels:
    int32 `[B, H, S]`.
    """

    order: Tensor
    offsets: Tensor
    centroids: Tensor
    sizes: Tensor
    labels: Tensor


def kmeans(
    x: Tensor,
    clusters: int | Tensor,
    iterations: int = 2,
    *,
    layout: str = "BSHD",
    backend: str | None = None,
) -> Clusters:
    """Cluster the tokens of each head.

    Args:
        x: `[B, S, H, D]`.
        clusters: How many, at most S, started from evenly spaced tokens; or centroids
            `[B, H, C, D]` to go on from.
        iterations: Assignments, each followed by new means; at least 1. 2 after a warm start, 10
            or more from the beginning.
        layout: "BSHD" or "BHSD".
        backend: "torch", "triton" or None for the best that can run here.

    Raises:
        ValueError: Too many clusters, shapes that do not fit, no iterations, a needed gradient, or
            a backend that cannot run.
    """
    x = to_heads_first(x, layout)
    length = x.shape[2]
    if isinstance(clusters, int):
        if not 1 <= clusters <= length:
            raise ValueError(f"clusters is {clusters}; it must be from 1 to the {length} tokens.")
        starts = torch.arange(clusters, device=x.device) * length // clusters
        centroids = x[:, :, starts].float()
    else:
        centroids = clusters.float()
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1.")
    for _ in range(iterations):
        labels = assign_clusters(x, centroids, layout="BHSD", backend=backend)
        order = labels.argsort(dim=-1, stable=True)
        edges = torch.arange(centroids.shape[2] + 1, device=x.device, dtype=torch.int32)
        offsets = torch.searchsorted(
            labels.gather(-1, order), edges.expand(*labels.shape[:2], -1).contiguous()
        ).to(torch.int32)
        pooled = mean_pool(x, offsets, order=order, layout="BHSD", backend=backend)
        centroids = torch.where((pooled.sizes > 0)[..., None], pooled.mean, centroids)
    return Clusters(order, offsets, centroids, pooled.sizes, labels)


def assign_clusters(
    x: Tensor, centroids: Tensor, *, layout: str = "BSHD", backend: str | None = None
) -> Tensor:
    """Number of the nearest centroid, the lowest of equally near ones, int32 `[B, H, S]`.

    Args:
        x: `[B, S, H, D]`.
        centroids: `[B, H, C, D]`, C at least 1.
        layout: Of `x`, "BSHD" or "BHSD".
        backend: "torch", "triton" or None for the best that can run here.

    Raises:
        ValueError: Shapes that do not fit, a needed gradient, or a backend that cannot run.
    """
    x = to_heads_first(x, layout)
    want = (*x.shape[:2], x.shape[3])
    if centroids.dim() != 4 or (*centroids.shape[:2], centroids.shape[3]) != want:
        raise ValueError(
            f"centroids are {tuple(centroids.shape)}; for {tuple(x.shape)} (heads first) they must "
            f"be [{x.shape[0]}, {x.shape[1]}, C, {x.shape[3]}]."
        )
    if needs_grad(x, centroids):
        raise ValueError(
            "assign_clusters has no backward pass and a gradient is needed; call it under "
            "torch.no_grad()."
        )
    # |x - c|^2 = |x|^2 - 2 (x . c - |c|^2 / 2)
    bias = centroids.float().square().sum(-1) / 2
    if pick_backend(backend, x) == "triton":
        from .kernel import assign_clusters_triton

        return assign_clusters_triton(x, centroids.to(x.dtype), bias)
    near = x.float() @ centroids.float().transpose(-1, -2) - bias[:, :, None]
    return near.argmax(-1).to(torch.int32)
