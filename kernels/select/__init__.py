"""From block scores to a block mask."""

from .api import CostGreedy, Count, MassBelow, MassKept, select_blocks

__all__ = ["CostGreedy", "Count", "MassBelow", "MassKept", "select_blocks"]
