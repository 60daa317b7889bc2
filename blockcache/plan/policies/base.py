"""The two kinds of policy."""

from collections.abc import Sequence

from blockcache.plan.steps import Step

Mask = tuple[tuple[bool, ...], ...]
"""[units][steps], True where computed."""


class Policy:
    """Base class of everything that decides when to compute."""


class StaticPolicy(Policy):
    """A policy whose decisions are known before the first forward."""

    def mask(self, steps: Sequence[Step], units: int) -> Mask:
        """True where a unit is computed, `[units][len(steps)]`. Step 0 is computed in any case."""
        raise NotImplementedError
