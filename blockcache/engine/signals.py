"""What is measured on tensors for decisions and for the summary."""

import inspect
from typing import Any

import torch
from torch import nn

from blockcache.engine.blocks import Blocks
from blockcache.engine.branch import Branch, Probe, Unit, Values
from blockcache.engine.stats import SAMPLE, RunStats, ratios, spread
from blockcache.engine.wiring import leaf_at, rebuilt
from blockcache.kernels.linear_combine import relative_change
from blockcache.plan.policies import Gate
from blockcache.plan.recipe import Recipe
from blockcache.plan.steps import Step

# Options whose value changes from step to step; everything else that is plain tells branches apart.
_TIME_NAMES = ("timestep", "t", "sigma", "timestep_cond", "r_timestep")


def argument_names(denoiser: nn.Module) -> tuple[str, ...]:
    """Parameter names of the denoiser's forward, in order."""
    return tuple(inspect.signature(type(denoiser).forward).parameters)[1:]


def form_of(named: dict[str, Any]) -> tuple[Any, ...]:
    """Shapes, dtypes, devices and plain options of a call. Another form is another branch."""
    return tuple(
        (name, _form(value))
        for name, value in named.items()
        if value is not None and name not in _TIME_NAMES
    )


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(_form(item) for item in value)
    if isinstance(value, (bool, int, str)):
        return value
    return type(value).__name__


def sizes(form: tuple[Any, ...]) -> set[Any]:
    """The tensor forms within a form."""
    return {item for _, item in form if isinstance(item, tuple) and len(item) == 3}


def adapter_state(denoiser: nn.Module) -> Any:
    """Active adapters and their scales at the first adapted layer, or None without adapters."""
    if not getattr(denoiser, "_hf_peft_config_loaded", False):
        return None
    for module in denoiser.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            active = tuple(getattr(module, "active_adapters", ()))
            return active, tuple(sorted(scaling.items())), getattr(module, "disable_adapters", None)
    return None


def offloading_objection(blocks: Blocks) -> str:
    """Why parts of the stack cannot be skipped under diffusers' group offloading, if so.

    Blocks offloaded together are loaded by the first of them; skipping that one alone would leave
    the others behind on the wrong device.
    """
    for block in blocks:
        hooks = getattr(getattr(block.module, "_diffusers_hook", None), "hooks", {})
        group = getattr(hooks.get("group_offloading"), "group", None)
        if len(getattr(group, "modules", ())) > 1:
            return "blocks are offloaded in groups; use num_blocks_per_group=1 or a 'stack' recipe"
    return ""


def copied(output: Any) -> Any:
    """The output with every tensor copied."""
    if isinstance(output, (tuple, list)):
        return rebuilt(output, [copied(item) for item in output])
    return output.clone() if isinstance(output, torch.Tensor) else output


def probe_residual(
    branch: Branch, probe: Probe, entered: Values, output: Any
) -> torch.Tensor | None:
    """What the blocks of the probe added to the main stream. Overwrites `entered`.

    Where they change its shape (a U-Net's first block) it is their output.
    """
    if branch.wiring is None:
        return None
    port = branch.wiring.ports[probe.last]
    name = next(iter(port.outputs))
    left: torch.Tensor = leaf_at(output, port.outputs[name])
    before = entered.get(name)
    if before is None or before.shape != left.shape:
        return left.clone()
    return torch.sub(left, before, out=before)


def change_of(current: torch.Tensor | None, reference: torch.Tensor | None) -> torch.Tensor | None:
    """(sum of differences, sum of magnitudes) of a change, on the device."""
    if current is None or reference is None:
        return None
    change: torch.Tensor = relative_change(current, reference)
    return change


def read_changes(changes: list[torch.Tensor]) -> list[float]:
    """Relative changes as numbers. The one host read of an online gate."""
    if not changes:
        return []
    rows = torch.stack(changes).tolist()
    return [d / m if m > 0 else float("nan") for d, m in rows]


def note_drift(branch: Branch, unit: Unit, step: Step, payload: Values) -> None:
    """Compare a fresh payload with the last one, and with what reuse would have given instead.

    Estimated on a sample of the main stream; nothing is read from the device.
    """
    name, fresh = next(iter(payload.items()))
    history = [anchor.payload.get(name) for anchor in unit.history]
    anchors = [_sample(old) for old in history if old is not None and old.shape == fresh.shape]
    if len(anchors) != len(unit.history):
        return
    sample = _sample(fresh)
    if not branch.probes:
        branch.stats.changes.append(relative_change(sample, anchors[0]))
    predicted = torch.zeros_like(sample)
    for weight, anchor in zip(branch.weights(unit, step), anchors, strict=False):
        predicted.add_(anchor, alpha=weight)
    branch.stats.drift.append(relative_change(predicted, sample))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """An evenly strided view of about `SAMPLE` elements."""
    flat = tensor.reshape(-1)
    stride = max(1, flat.numel() // SAMPLE)
    return flat[:: stride + (stride > 1 and stride % 2 == 0)].float()


def nothing_reused(recipe: Recipe, stats: RunStats) -> str:
    """The words for a run that reused nothing, with the numbers seen."""
    changes = sorted(c for branch in stats.branches for c in ratios(branch.changes))
    gates = [rule.policy for rule in recipe.rules if isinstance(rule.policy, Gate)]
    seen = spread(changes)
    if not gates or seen is None:
        return f"the run reused nothing: recipe {recipe.name!r} computed every step"
    useful = changes[int(0.3 * (len(changes) - 1))]
    return (
        f"the run reused nothing: changes seen {seen['min']:.3g} / {seen['median']:.3g} / "
        f"{seen['max']:.3g} (min / median / max), threshold {gates[0].threshold:.3g}; "
        f"a threshold of {useful * 1.001:.3g} would have reused about 30 %"
    )
