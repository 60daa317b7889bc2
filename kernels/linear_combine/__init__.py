"""Weighted sums of stored tensors, and how much two tensors differ."""

from .api import linear_combine, relative_change

__all__ = ["linear_combine", "relative_change"]
