"""Errors a program may want to catch: `ValueError`s that say what was found and what to do."""


class BlockCacheError(ValueError):
    """Base of every error raised on purpose by blockcache."""


class UnsupportedModelError(BlockCacheError):
    """No block list with a usable input/output contract was found in the model."""


class PlanError(BlockCacheError):
    """A plan, recipe or preset that cannot be read, or whose values are impossible."""


class PlanMismatchError(PlanError):
    """A valid plan that was made for another model."""
