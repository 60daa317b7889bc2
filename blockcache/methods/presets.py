"""The three words: what to take when nothing has been measured for a model."""

from blockcache.methods.corrected import corrected
from blockcache.plan.recipe import Recipe

BUDGETS = {"quality": 0.48, "balanced": 0.32, "fast": 0.16}
"""Share of steps computed. Where a model has a measured plan of its own, that is taken instead."""


def preset(word: str) -> Recipe:
    """The recipe behind a preset word."""
    made = corrected(BUDGETS[word])
    return Recipe(made.rules, made.branches, word)
