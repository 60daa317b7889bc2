"""Attention over chosen key blocks, exact on what is chosen."""

from .api import is_supported, sparse_attention
from .plan import Centroids, SparsePlan, merge_states, pack_bits, unpack_bits

__all__ = [
    "Centroids",
    "SparsePlan",
    "is_supported",
    "merge_states",
    "pack_bits",
    "sparse_attention",
    "unpack_bits",
]
