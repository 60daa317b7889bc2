"""The corrector: a computed step makes good what the predictions before it did wrong."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from blockcache.plan.predictors import Predictor, Taylor
from blockcache.plan.spec import spec
from blockcache.plan.steps import Step


@spec
class Corrector:
    """The corrector of a predictor-corrector multistep method, for an Euler sampler.

    While steps are reused, the sampler walks on predictions. The fresh output tells, by the
    polynomial of degree `order` through it and the computed ones before it, what these steps should
    have been. An Euler step is linear in the model's output, so the sum of what went wrong, over
    the length of the present step, is added to the fresh output, and the sampler lands where it
    would have landed. It costs no forward. The idea is UniC's, the corrector of UniPC (2302.04867),
    on the steps of the uncached run: there is nothing to correct where all steps are computed.

    On the embedded model it adds 2 to 7 dB in the median and up to 19 dB in the worst prompt to the
    same mask. With one computed step in ten the two ends of a gap say too little about its middle,
    and it may lose in the median.

    order: 1 draws a line from the last computed step to the fresh one.
    """

    order: Annotated[int, Field(ge=1, le=3)] = 2

    @property
    def depth(self) -> int:
        """As many computed steps as its order, besides the fresh one."""
        return self.order

    def weights(
        self, at: Step, gap: Sequence[Step], anchors: Sequence[Step], predictor: Predictor
    ) -> tuple[float, ...] | None:
        """Weights of the fresh output and of each anchor, newest first; their sum is 1.

        at: the computed step. gap: the reused steps between the newest anchor and it, which
        `predictor` filled. None where there is nothing to correct or the sampler is no Euler.
        """
        strides = [step.stride for step in gap]
        if not at.stride or not strides or None in strides:
            return None
        total = [1.0] + [0.0] * len(anchors)
        fit = Taylor(self.order)
        for step in gap:
            share = (step.stride or 0.0) / at.stride
            for j, weight in enumerate(fit.weights(step, (at, *anchors[: self.order]))):
                total[j] += share * weight
            for j, weight in enumerate(predictor.weights(step, anchors), 1):
                total[j] -= share * weight
        return tuple(total)
