"""Policies: when to compute."""

from blockcache.plan.policies.base import Mask, Policy, StaticPolicy
from blockcache.plan.policies.gate import Gate
from blockcache.plan.policies.static import Every, Geometric, MaskTable

__all__ = ["Every", "Gate", "Geometric", "Mask", "MaskTable", "Policy", "StaticPolicy"]
