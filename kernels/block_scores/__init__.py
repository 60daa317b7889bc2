"""How much attention goes from query blocks to key blocks, estimated or exact."""

from .api import antidiagonal_scores, block_mass, centroid_scores, mean_pool
from .kmeans import Clusters, assign_clusters, kmeans
from .profile import Profile, profile_plans
from .reference import Pooled

__all__ = [
    "Clusters",
    "Pooled",
    "Profile",
    "antidiagonal_scores",
    "assign_clusters",
    "block_mass",
    "centroid_scores",
    "kmeans",
    "mean_pool",
    "profile_plans",
]
