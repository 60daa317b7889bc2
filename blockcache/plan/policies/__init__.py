"""Policies: when to compute."""

from blockcache.plan.policies.base import Mask, Policy, StaticPolicy
from blockcache.plan.policies.online import Codebook, Gate, Ranked, Verified
from blockcache.plan.policies.static import Bathtub, Every, Geometric, Growing, MaskTable, Within

__all__ = [
    "Bathtub",
    "Codebook",
    "Every",
    "Gate",
    "Geometric",
    "Growing",
    "Mask",
    "MaskTable",
    "Policy",
    "Ranked",
    "StaticPolicy",
    "Verified",
    "Within",
]
