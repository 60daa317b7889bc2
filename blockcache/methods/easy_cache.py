"""EasyCache (2507.02860).

The denoiser is taken as one function of the latents. Its gain, the change of the output per change
of the latents between the last two computed steps, times the latents' change tells how much the
output is about to change; that is added up, and below a threshold output - latents is added again.

Kept: the rule, the first and last full steps, the payload in the size of the latents, the leading
first branch that decides for the others. Different: the first full steps are a share of the run (10
of 50 for Wan, 5 of 50 for HunyuanVideo); where output and latents differ in shape, as in models
that also predict a variance, the output itself is repeated. State: a few tensors of the latents'
size per branch, the least of all; one host read per step.
"""

from blockcache.plan import Cooldown, Gate, Recipe, Rule, Site, Warmup


def easy_cache(threshold: float = 0.05, warmup: int | float = 0.2, cooldown: int = 1) -> Recipe:
    """Reuse the denoiser's output while its estimated changes add up to less than `threshold`.

    threshold: summed relative L1 change, no unit; 0.025 to 0.2, the paper has 0.025 for
    HunyuanVideo and 0.05 for Wan. warmup: first steps always computed, a number or a share of the
    run. cooldown: last steps always computed.
    """
    gate = Gate(threshold, "latent", "previous", accumulate=True)
    rule = Rule(Site("model"), gate, guards=(Warmup(warmup), Cooldown(cooldown)))
    return Recipe((rule,), "leader", f"easy_cache {threshold:g}")
