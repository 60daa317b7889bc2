"""Online gates: decide step by step from a measured change."""

from typing import Annotated, Literal

from pydantic import Field

from blockcache.plan.policies.base import Policy
from blockcache.plan.spec import spec


@spec
class Gate(Policy):
    """Reuse while a signal changed little.

    threshold: relative L1 change, sum|a - b| / sum|b|, below which the site is reused. No unit,
    useful 0.03 to 0.2; 0 never reuses. Larger is faster and farther from the uncached picture.
    signal: what is compared. "first_block" is the residual of the blocks in front of the site.
    reference: compared with the last "computed" step or the "previous" one.
    accumulate: add the changes up since the last computed step and compare the sum.
    """

    threshold: Annotated[float, Field(ge=0, le=10)] = 0.08
    signal: Literal["first_block"] = "first_block"
    reference: Literal["computed", "previous"] = "computed"
    accumulate: bool = False

    def should_compute(self, change: float, accumulated: float) -> bool:
        """Decide from this step's change and the sum of those since the last computed step.

        A change that is not a number (an all-zero reference) computes.
        """
        seen = accumulated + change if self.accumulate else change
        return not seen < self.threshold
