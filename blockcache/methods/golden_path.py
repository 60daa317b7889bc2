"""Searched schedules of the Golden-Path study (`nanguoyu/Golden-Path-Hypothesis`, 2026).

The best ways found to compute 9, 13 or 21 of 50 steps of FLUX.1-dev and Qwen-Image, by hill
climbing on the final picture over a few prompts with plain residual reuse. The study reports that
one such schedule serves unseen prompts about as well as a gate that decides for each. Kept: the
steps and the predictor. They travel to other step counts by the share of the run. State: one stack
residual per branch.
"""

from typing import Literal

from blockcache.errors import PlanError
from blockcache.plan import MaskTable, Recipe, Rule, Site, Taylor

_SCHEDULES: dict[tuple[str, int], tuple[int, ...]] = {
    ("flux", 9): (0, 1, 2, 3, 5, 8, 13, 27, 49),
    ("flux", 13): (0, 1, 2, 3, 4, 6, 8, 10, 14, 19, 30, 43, 49),
    ("flux", 21): (*range(12), 13, 15, 17, 19, 24, 30, 38, 46, 49),
    ("qwen-image", 9): (0, 1, 2, 3, 5, 9, 17, 31, 49),
    ("qwen-image", 13): (*range(7), 8, 11, 14, 22, 35, 49),
    ("qwen-image", 21): (*range(11), 12, 14, 16, 19, 22, 26, 33, 40, 46, 49),
}


def golden_path(
    computed: int = 13, model: Literal["flux", "qwen-image"] = "flux", order: int = 0
) -> Recipe:
    """The searched schedule that computes `computed` of 50 steps.

    computed: 9, 13 or 21. model: what it was searched on, "flux" or "qwen-image". order: of the
    extrapolation; the searches copied (0).

    Raises:
        PlanError: no such schedule.
    """
    if (model, computed) not in _SCHEDULES:
        known = ", ".join(f"{m} {n}" for m, n in _SCHEDULES)
        raise PlanError(f"no searched schedule for {model} with {computed} steps (known: {known})")
    table = MaskTable((_SCHEDULES[model, computed],), 50)
    rule = Rule(Site("stack"), table, Taylor(order))
    return Recipe((rule,), name=f"golden_path {model} {computed}")
