"""Real runs as a measure, for methods that search or weigh by them (BudCache, LeMiCa)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from blockcache import api
from blockcache.errors import BlockCacheError
from blockcache.plan import MaskTable, Recipe, Rule, Site
from blockcache.plan.trace import Trace
from blockcache.tuning.stage import Stage, final_of, items_of


def latent_error(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int] | None = None, **call_kwargs: Any
) -> Callable[[Recipe], float]:
    """A function that runs a recipe and gives the mean squared error of its final latents.

    Relative to the mean square of the uncached latents, mean over the prompts; 0 is exact. Every
    call costs one cached run per prompt; the uncached ones are done here.

    Args:
        pipe: A pipeline; left disabled.
        prompts: One to a few.
        seeds: One per prompt; 0, 1, ... if None.
        call_kwargs: Passed to every pipeline call.

    Raises:
        BlockCacheError: no prompts or impossible arguments.
    """
    items = items_of(prompts, seeds)
    stage = Stage(pipe, call_kwargs, "latent_error")
    api.disable(pipe)
    references = [final_of(stage.latents(item)).astype(np.float64) for item in items]

    def error(recipe: Recipe) -> float:
        with api.enabled(pipe, recipe):
            found = [final_of(stage.latents(item)) for item in items]
        pairs = zip(found, references, strict=True)
        return float(np.mean([np.mean((a - b) ** 2) / np.mean(b**2) for a, b in pairs]))

    return error


def with_segments(
    pipe: Any,
    trace: Trace,
    span: int = 8,
    prompts: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """The trace with the final error of every single stretch of reuse (LeMiCa, 2511.00090).

    For each pair of steps (i, j) at most `span` apart one run per prompt, in which the steps
    between them reuse the stack's residual and all others are computed: nearly `span` times as many
    runs as there are steps, each about as long as an uncached one.

    Args:
        pipe: The traced pipeline; left disabled.
        trace: Its trace; prompts, seeds and settings are taken from it.
        span: Longest stretch, in steps from i to j, at least 2.
        prompts: How many of the trace's prompts to use.
        on_progress: Called with (runs done, runs in all).

    Raises:
        BlockCacheError: a span below 2, or no prompts.
    """
    total = len(trace.sigmas)
    if span < 2 or not 1 <= prompts <= len(trace.prompts):
        raise BlockCacheError(
            f"need span >= 2 and 1 to {len(trace.prompts)} prompts, got {span} and {prompts}"
        )
    stage = Stage(pipe, trace.settings, "with_segments")
    items = items_of(trace.prompts[:prompts], trace.seeds[:prompts])
    pairs = [(i, j) for i in range(total) for j in range(i + 2, min(i + span + 1, total))]
    errors = np.full((total, total), np.nan)
    for done, (i, j) in enumerate(pairs):
        kept = tuple(step for step in range(total) if not i < step < j)
        recipe = Recipe((Rule(Site("stack"), MaskTable((kept,), total)),), name=f"all but {i}..{j}")
        with api.enabled(pipe, recipe):
            found = [final_of(stage.latents(item)) for item in items]
        differences = [
            np.abs(a - b).mean() / np.abs(b).mean()
            for a, b in zip(found, trace.latents, strict=False)
        ]
        errors[i, j] = float(np.mean(differences))
        if on_progress is not None:
            on_progress(done + 1, len(pairs))
    return replace(trace, segments=errors)
