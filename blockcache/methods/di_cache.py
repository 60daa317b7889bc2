"""DiCache (2508.17356).

The first blocks run as a probe in every step. Their output's changes from step to step are added up
until a threshold asks for a computed step, which goes on from the probe. Else the residual is put
on the line through the last two computed ones, as far along as the probe's own residual has moved.

Kept: the signal, the sum, the two-anchor residual and its limits, the first steps as a share of the
run, the last step. Different: the residual is that of the blocks behind the probe and is added to
the probe's fresh output; the authors add the whole stack's to the stack's input and drop the
probe's result. They compute one step more at the beginning. State: two residuals of the probe and
two of the rest, and the probe's last output, per branch; one host read per step.
"""

from blockcache.plan import Cooldown, Gate, ProbeRatio, Recipe, Rule, Site, Warmup


def di_cache(
    threshold: float = 0.4,
    probe: int | float = 1,
    warmup: int | float = 0.2,
    cooldown: int = 1,
    most: float = 1.5,
) -> Recipe:
    """Reuse the blocks behind the probe while its changes add up to less than `threshold`.

    threshold: summed relative L1 change, no unit; the paper has 0.4 for FLUX, 0.1 for HunyuanVideo.
    probe: blocks that always run, 1 to 5, or a share between 0 and 1. warmup: first steps always
    computed, a number or a share of the run. cooldown: last steps always computed. most: how far
    beyond the newest residual the line is followed, where 1 copies; 1.5 for FLUX, 2 for Wan.
    """
    gate = Gate(threshold, "probe", "previous", accumulate=True)
    guards = (Warmup(warmup), Cooldown(cooldown))
    rule = Rule(Site("span", probe), gate, ProbeRatio(1.0, most), guards)
    return Recipe((rule,), name=f"di_cache {threshold:g}")
