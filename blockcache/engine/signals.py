"""What is measured on tensors for decisions and for the summary."""

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from blockcache.engine.blocks import Block, Blocks
from blockcache.engine.stats import SAMPLE, RunStats, ratios, spread
from blockcache.engine.wiring import is_record, leaf_at, leaves, rebuilt
from blockcache.kernels.linear_combine import relative_change
from blockcache.plan.policies import Gate
from blockcache.plan.recipe import Recipe
from blockcache.plan.steps import Step

if TYPE_CHECKING:
    from blockcache.engine.branch import Branch, Unit

Values = dict[str, torch.Tensor]

_EMBEDDING_NAMES = ("temb", "emb", "time_emb", "timestep_proj", "temb_mod_params", "timestep", "c")
_LARGEST_SIGMA = 200.0
"""Of k-diffusion's noise levels; what is larger is a timestep."""
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


def latents_of(named: dict[str, Any], order: tuple[str, ...]) -> torch.Tensor | None:
    """A copy of what the denoiser works on: its first tensor."""
    for name in (*order, *named):
        if isinstance(value := named.get(name), torch.Tensor):
            return value.clone()
    return None


def grid_of(denoiser: nn.Module, named: dict[str, Any]) -> tuple[int, ...]:
    """Height and width (for video frames, height, width) in tokens; empty if unknown."""
    positions = named.get("img_ids")
    if isinstance(positions, torch.Tensor):
        # Position ids of the tokens; one read, and of the same tensor in every step.
        highest = positions.reshape(-1, positions.shape[-1]).amax(0).tolist()
        return tuple(int(size) + 1 for size in highest[-2:])
    latents = next((v for v in named.values() if isinstance(v, torch.Tensor)), None)
    if latents is None or latents.dim() not in (4, 5):
        return ()
    patch = getattr(getattr(denoiser, "config", None), "patch_size", 1) or 1
    sizes = latents.shape[2:]
    patches = (
        tuple(patch)
        if isinstance(patch, (tuple, list))
        else (1,) * (len(sizes) - 2) + (patch, patch)
    )
    return tuple(size // p for size, p in zip(sizes, patches, strict=True))


def copied(output: Any) -> Any:
    """The output with every tensor copied."""
    if is_record(output):
        return rebuilt(output, [copied(item) for item in output.values()])
    if isinstance(output, (tuple, list)):
        return rebuilt(output, [copied(item) for item in output])
    return output.clone() if isinstance(output, torch.Tensor) else output


def left(branch: "Branch", index: int, output: Any) -> torch.Tensor:
    """A copy of the main stream that left block `index`."""
    return _leaving(branch, index, output)[1].clone()


def residual(branch: "Branch", index: int, entered: Values, output: Any) -> torch.Tensor:
    """What was added to the main stream between `entered` and the output of block `index`.

    Where its shape changed (a U-Net's first block) it is the output.
    """
    name, leaving = _leaving(branch, index, output)
    before = entered.get(name)
    if before is None or before.shape != leaving.shape:
        return leaving.clone()
    return leaving - before


def _leaving(branch: "Branch", index: int, output: Any) -> tuple[str, torch.Tensor]:
    outputs = branch.port(index).outputs
    name = next(iter(outputs))
    return name, leaf_at(output, outputs[name])


def main_tensor(output: Any) -> torch.Tensor | None:
    """The first tensor of an output."""
    tensors = (leaf for _, leaf in leaves(output) if isinstance(leaf, torch.Tensor))
    return next(tensors, None)


def modulated(block: Block, main: str, bound: dict[str, Any]) -> torch.Tensor | None:
    """The first normed and time-modulated input of a block, or its time embedding.

    The norm is run once more by itself, where it is a module that takes the embedding (`emb` or
    `temb`). A block that modulates inside its forward is represented by the embedding alone. None
    where neither is found.
    """
    embedding = next((bound[n] for n in _EMBEDDING_NAMES if _is_float(bound.get(n))), None)
    norm = getattr(block.module, "norm1", None)
    if norm is None:
        return embedding
    taken = tuple(inspect.signature(type(norm).forward).parameters)[1:]
    known = {**bound, "emb": embedding, "temb": embedding, "hidden_dtype": bound[main].dtype}
    others = {name: known[name] for name in taken[1:] if known.get(name) is not None}
    if not {"emb", "temb", "timestep"} & set(others):
        return embedding
    return main_tensor(norm(bound[main], **others))


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def filtered(
    tokens: torch.Tensor, grid: tuple[int, ...], step: Step, is_flow: bool, falloff: float
) -> torch.Tensor | None:
    """Tokens `[B, N, D]` (or a picture `[B, C, H, W]`) with a Wiener filter over their grid.

    SeaCache's (2602.18993): the gain a S / (a^2 S + b^2) of each axis, S = |f|^-falloff, signal a
    and noise b of the step, keeps the frequencies that the noise level has resolved; its mean is
    made 1. None where the tokens do not fill the grid.
    """
    if tokens.dim() == 4:
        picture, axes = tokens.float(), (2, 3)
    elif tokens.dim() == 3 and grid and math.prod(grid) <= tokens.shape[1]:
        picture = tokens[:, -math.prod(grid) :].float().unflatten(1, grid)
        axes = tuple(range(1, 1 + len(grid)))
    else:
        return None
    spectrum = torch.fft.rfftn(picture, dim=axes)
    signal, noise = _signal_and_noise(step, is_flow)
    for axis in axes:
        size = picture.shape[axis]
        places = torch.fft.rfftfreq(size) if axis == axes[-1] else torch.fft.fftfreq(size)
        power = (places.abs() * size).clamp(min=1.0) ** -falloff
        gain = signal * power / (signal**2 * power + noise**2)
        shape = [1] * spectrum.dim()
        shape[axis] = -1
        spectrum = spectrum * (gain / gain.mean()).to(spectrum.device).view(shape)
    sizes = [picture.shape[axis] for axis in axes]
    result: torch.Tensor = torch.fft.irfftn(spectrum, s=sizes, dim=axes)
    return result


def _signal_and_noise(step: Step, is_flow: bool) -> tuple[float, float]:
    """Shares of picture and noise in the latents."""
    if is_flow:
        return 1.0 - step.sigma, max(step.sigma, 1e-6)
    if step.sigma < _LARGEST_SIGMA:
        size = math.hypot(1.0, step.sigma)
        return 1.0 / size, step.sigma / size
    # A timestep in place of a noise level: the cosine schedule is near enough.
    angle = step.noise_time * math.pi / 2
    return math.cos(angle), max(math.sin(angle), 1e-6)


def sums(current: torch.Tensor, reference: torch.Tensor, per_sample: bool) -> torch.Tensor:
    """(sum of differences, sum of magnitudes) `[samples or 1, 2]`, on the device."""
    if not per_sample or len(current) == 1:
        change: torch.Tensor = relative_change(current, reference)
        return change[None]
    pairs = zip(current, reference, strict=True)
    return torch.stack([relative_change(a, b) for a, b in pairs])


def products(unit: "Unit") -> torch.Tensor:
    """(a.b, a.a, b.b) of the last two payloads: token means of the first eighth of the channels."""
    name = next(iter(unit.history[0].payload))
    new, old = (anchor.payload[name] for anchor in (unit.history[0], unit.history[1]))
    channels = max(1, new.shape[-1] // 8)
    a, b = (t[..., :channels].float().flatten(1, -2).mean(1) for t in (new, old))
    return torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])


def note_drift(branch: "Branch", unit: "Unit", step: Step, payload: Values) -> None:
    """Compare a fresh payload with the last one, and with what reuse would have given instead.

    Estimated on a sample of the main stream; nothing is read from the device.
    """
    name, fresh = next(iter(payload.items()))
    history = [anchor.payload.get(name) for anchor in unit.history]
    anchors = [_sample(old) for old in history if old is not None and old.shape == fresh.shape]
    if len(anchors) != len(unit.history):
        return
    sample = _sample(fresh)
    if not branch.deciders:
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
