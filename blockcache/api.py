"""What users call: enable, disable, enabled, summary, plan_for."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from blockcache import methods, sparse
from blockcache.engine.blocks import Blocks, find_blocks
from blockcache.engine.hooks import Attachment, attachment_of
from blockcache.engine.identity import fingerprint
from blockcache.engine.parts import find_parts
from blockcache.engine.runner import COMPILED_WHOLE, Runner
from blockcache.engine.summary import Summary, summarise
from blockcache.errors import BlockCacheError, PlanError, UnsupportedModelError
from blockcache.methods.presets import BUDGETS, preset
from blockcache.plan import (
    Gate,
    Layout,
    MaskTable,
    Plan,
    Recipe,
    Site,
    Sparse,
    Verified,
    even_steps,
    steps_from_sigmas,
)

logger = logging.getLogger("blockcache")

T = TypeVar("T")
What = str | Path | Recipe | Plan

_DENOISERS = ("transformer", "transformer_2", "unet", "prior")


def enable(target: T, what: What = "balanced", *, scheduler: Any = None, group: Any = None) -> T:
    """Make `target` faster from its next call on, at the price of somewhat different pictures.

    Enabling again replaces what was enabled before. Nothing is allocated until the first call.

    Args:
        target: A diffusers pipeline, or a denoiser (transformer or U-Net) by itself.
        what: "quality", "balanced" or "fast"; a recipe's name; a `Recipe`; a `Plan`; or the path
            of a plan file.
        scheduler: Only for a denoiser driven by a loop of your own: the scheduler of that loop.
            Pipelines are found without it.
        group: Only where processes split one sample's tokens in a way of your own: their
            `torch.distributed` process group. What online rules measure is summed over it, so that
            all of them decide alike. diffusers' context parallelism is found without it;
            processes that render samples of their own need none.

    Returns:
        `target` itself.

    Raises:
        UnsupportedModelError: no denoiser, or no blocks in it, or diffusers' own cache is on.
        BlockCacheError: `scheduler` is no scheduler.
        PlanError: an unknown word, a bad plan, or a site that does not fit the model.
        PlanMismatchError: a plan that was made for another model.
    """
    if scheduler is not None and not hasattr(scheduler, "timesteps"):
        raise BlockCacheError(
            f"scheduler must be a diffusers scheduler (have timesteps), got {scheduler!r:.60}"
        )
    chosen = read(what)
    prepared = [
        (model, _runner(model, chosen, scheduler, group)) for model in denoisers(target).values()
    ]
    disable(target)
    for model, runner in prepared:
        runner.siblings = [other for _, other in prepared if other is not runner]
        hides_blocks = _is_wrapped(target, model) or (
            model._compiled_call_impl is not None and not runner.needs_no_blocks
        )
        Attachment(runner)
        if hides_blocks:
            runner.say(COMPILED_WHOLE)
        name, count = type(model).__name__, len(runner.blocks)
        logger.info("%s: enabled %s on %d blocks", name, runner.recipe.name, count)
    return target


def disable(target: T) -> T:
    """Give `target` back exactly as it was. Does nothing where nothing is enabled."""
    for model in denoisers(target).values():
        attachment = attachment_of(model)
        if attachment is not None:
            attachment.detach()
    return target


@contextmanager
def enabled(
    target: T, what: What = "balanced", *, scheduler: Any = None, group: Any = None
) -> Iterator[T]:
    """`enable` for the length of a `with` block; afterwards `disable`, whatever happened."""
    enable(target, what, scheduler=scheduler, group=group)
    try:
        yield target
    finally:
        disable(target)


def summary(target: Any) -> Summary:
    """What the last run did: steps and blocks reused, changes, drift estimate, cache size.

    Raises:
        BlockCacheError: nothing is enabled on `target`.
    """
    attached = attachments(target)
    if not attached:
        raise BlockCacheError("nothing is enabled here; call blockcache.enable(...) first")
    return summarise(attached)


def plan_for(target: Any, what: What = "balanced", steps: int = 50, sigmas: Any = None) -> Plan:
    """`what` evaluated for this model and step count, as a plan that can be saved.

    Args:
        target: A pipeline or denoiser; of a pipeline with two denoisers the first is taken.
        what: As for `enable`; a plan is checked and given back as it is.
        steps: Steps of the run.
        sigmas: The sampler's noise levels, one per step (and a final one); without them the plan
            travels to other step counts by share of the run.

    Raises:
        PlanError, PlanMismatchError, UnsupportedModelError: as for `enable`.
    """
    if not isinstance(steps, int) or steps < 1:
        raise PlanError(f"steps must be a whole number, at least 1, got {steps!r:.60}")
    chosen = read(what)
    model = next(iter(denoisers(target).values()))
    blocks = find_blocks(model)
    recipe = _recipe_for(model, blocks, chosen)
    if isinstance(chosen, Plan):
        return chosen
    levels = None if sigmas is None else [float(s) for s in sigmas]
    if levels is not None and len(levels) not in (steps, steps + 1):
        raise PlanError(f"expected {steps} sigmas (or one more, the final one), got {len(levels)}")
    places = even_steps(steps) if levels is None else steps_from_sigmas(levels[:steps])
    sampler = type(getattr(target, "scheduler", None)).__name__
    mark = fingerprint(model, blocks, "" if sampler == "NoneType" else sampler)
    layout = Layout((len(blocks),), blocks.unet)
    return Plan.make(recipe, mark, places, layout, with_sigmas=levels is not None)


def denoisers(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by component name, or a denoiser itself under "".

    Raises:
        UnsupportedModelError: there is none.
    """
    if isinstance(target, nn.Module):
        return {"": getattr(target, "_orig_mod", target)}
    found: dict[str, nn.Module] = {}
    for name in _DENOISERS:
        part = getattr(target, name, None)
        model = getattr(part, "_orig_mod", part)
        # One model may stand under two names.
        if isinstance(model, nn.Module) and model not in found.values():
            found[name] = model
    if not found:
        parts = sorted(getattr(target, "components", {}))
        raise UnsupportedModelError(
            f"{type(target).__name__} has no denoiser under a known name "
            f"({', '.join(_DENOISERS)}); its parts: {', '.join(parts) or 'none'}. "
            "Pass the denoiser itself."
        )
    return found


def read(what: What) -> Recipe | Plan:
    """Turn a word, name or path into a recipe or plan.

    Raises:
        PlanError: nothing of that name, or a bad plan file.
    """
    if isinstance(what, (Recipe, Plan)):
        return what
    if isinstance(what, Path):
        return Plan.load(what)
    if not isinstance(what, str):
        raise PlanError(f"expected a word, recipe, plan or path, got {type(what).__name__}")
    if what in BUDGETS:
        return preset(what)
    if what in methods.names():
        return methods.by_name(what)
    if what in sparse.names():
        return Recipe(name=what, sparse=Sparse(sparse.by_name(what)))
    if what.endswith(".json") or "/" in what:
        return Plan.load(what)
    known = ", ".join((*BUDGETS, *methods.names(), *sparse.names()))
    raise PlanError(f"unknown preset or recipe {what!r} (known: {known}; or a plan file *.json)")


def attachments(target: Any) -> dict[str, Attachment]:
    """What is attached to the enabled denoisers, by component name."""
    found = {name: attachment_of(model) for name, model in denoisers(target).items()}
    return {name: attachment for name, attachment in found.items() if attachment is not None}


def _is_wrapped(target: Any, model: nn.Module) -> bool:
    """Whether the denoiser is wrapped by torch.compile: it then traces past every hook."""
    parts = (target, *(getattr(target, name, None) for name in _DENOISERS))
    return any(getattr(part, "_orig_mod", None) is model for part in parts)


def _runner(model: nn.Module, chosen: Recipe | Plan, scheduler: Any, group: Any) -> Runner:
    if getattr(model, "is_cache_enabled", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has diffusers' own cache enabled; call disable_cache() first"
        )
    blocks = find_blocks(model)
    recipe = _recipe_for(model, blocks, chosen)
    made_for = chosen.fingerprint if isinstance(chosen, Plan) else None
    return Runner(model, blocks, recipe, scheduler, group, made_for)


def _recipe_for(model: nn.Module, blocks: Blocks, chosen: Recipe | Plan) -> Recipe:
    """The recipe, if it is one for this model."""
    if isinstance(chosen, Plan):
        chosen.fingerprint.check(fingerprint(model, blocks))
    recipe = chosen.recipe if isinstance(chosen, Plan) else chosen
    check_sites(recipe, blocks)
    return recipe


def check_sites(recipe: Recipe, blocks: Blocks) -> None:
    """Refuse sites that do not fit the model.

    Raises:
        PlanError: a site outside the model, of a kind not available, or a gate without a probe.
    """
    layout = Layout((len(blocks),), blocks.unet)
    for rule in recipe.rules:
        rule.site.check(layout)
        lo, hi = rule.site.limits(len(blocks))
        if rule.site.is_sub_layer:
            _check_parts(rule.site, blocks)
        if isinstance(rule.policy, Gate) and rule.policy.needs_probe and lo == 0:
            raise PlanError("a gate needs blocks in front of its site; use Site('span', 1)")
        if isinstance(rule.policy, Verified) and hi == len(blocks):
            raise PlanError("Verified needs a block behind its site; use Site('span', 0, -1)")
        if isinstance(rule.policy, MaskTable) and not rule.site.is_sub_layer:
            check_rows(rule.policy, rule.site, blocks)


def _check_parts(site: Site, blocks: Blocks) -> None:
    lo, hi = site.limits(len(blocks))
    if not any(lo <= part.block < hi for part in find_parts(blocks, (site.scope,))):
        raise PlanError(
            f"no {site.scope!r} sub-layer was found in blocks {lo}..{hi} of this model; "
            "use the site 'block', 'span' or 'stack'"
        )


def check_rows(table: MaskTable, site: Site, blocks: Blocks) -> None:
    """Refuse a mask table whose number of rows cannot fit its site.

    Raises:
        PlanError: neither one row nor one per unit.
    """
    rows, units = len(table.computed), len(site.units(Layout((len(blocks),), blocks.unet)))
    if rows not in (1, units):
        raise PlanError(
            f"the mask table has {rows} rows and the {site.scope} site {units} units: "
            f"give one row or {units}"
        )
