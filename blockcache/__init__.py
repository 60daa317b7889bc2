"""Faster diffusers pipelines by not doing work again, at a quality that is measured.

>>> import blockcache
>>> blockcache.enable(pipe, "balanced")  # doctest: +SKIP
>>> image = pipe("a lighthouse").images[0]  # doctest: +SKIP
>>> print(blockcache.summary(pipe))  # doctest: +SKIP
>>> blockcache.disable(pipe)  # doctest: +SKIP
"""

from blockcache import methods as recipes
from blockcache.api import disable, enable, enabled, plan_for, summary
from blockcache.errors import (
    BlockCacheError,
    PlanError,
    PlanMismatchError,
    UnsupportedModelError,
)
from blockcache.plan import Plan, Recipe, Rule, Site, Sparse
from blockcache.tuning.compare import compare
from blockcache.tuning.comparison import Comparison
from blockcache.tuning.correction import distilled, scale_shift
from blockcache.tuning.trace import trace
from blockcache.tuning.tune import tune

# from blockcache.tuning.compare import Comparison, compare

__version__ = "0.1.0"

__all__ = [
    "BlockCacheError",
    "Comparison",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "Recipe",
    "Rule",
    "Site",
    "Sparse",
    "UnsupportedModelError",
    "compare",
    "disable",
    "distilled",
    "enable",
    "enabled",
    "plan_for",
    "recipes",
    "scale_shift",
    "summary",
    "trace",
    "tune",
]
