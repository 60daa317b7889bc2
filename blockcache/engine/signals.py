"""What is measured on tensors for decisions and for the summary."""

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from blockcache.engine.blocks import Block, Blocks
from blockcache.engine.geometry import Arrangement, arrange
from blockcache.engine.stats import SAMPLE, RunStats, ratios, spread
from blockcache.engine.wiring import Values, leaf_at, leaves
from blockcache.errors import PlanError
from blockcache.kernels.linear_combine import relative_change
from blockcache.plan.policies import Codebook, Gate, Policy, StaticPolicy, Verified
from blockcache.plan.recipe import Recipe
from blockcache.plan.steps import Step

if TYPE_CHECKING:
    from blockcache.engine.branch import Branch, Unit

Rows = Sequence[bool]
"""For each sample whether it is computed."""

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
    """A copy of what the denoiser works on: its first argument that holds tensors."""
    for name in (*order, *named):
        if (value := stacked(named.get(name))) is not None:
            return value
    return None


def stacked(value: Any) -> torch.Tensor | None:
    """A copy of the tensor in a value; of a list of pictures of one size, all of them."""
    tensors = [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        return None
    is_list = len(tensors) > 1 and len({(t.shape, t.dtype) for t in tensors}) == 1
    return torch.stack(tensors) if is_list else tensors[0].clone()


def arrangement_of(denoiser: nn.Module, named: dict[str, Any]) -> Arrangement | None:
    """Where the tokens of a call lie, or None where nobody knows."""
    try:
        return arrange(denoiser, named)
    except PlanError:
        return None


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
    norm, tokens = getattr(block.module, "norm1", None), bound[main]
    # Under offloading the norm may be elsewhere until the block is called.
    if norm is not None and all(p.device == tokens.device for p in norm.parameters()):
        taken = tuple(inspect.signature(type(norm).forward).parameters)[1:]
        known = {**bound, "emb": embedding, "temb": embedding, "hidden_dtype": tokens.dtype}
        others = {name: known[name] for name in taken[1:] if known.get(name) is not None}
        if {"emb", "temb", "timestep"} & set(others):
            return main_tensor(norm(tokens, **others))
    return None if embedding is None else embedding.clone()


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def filtered(
    tokens: torch.Tensor,
    arrangement: Arrangement | None,
    step: Step,
    is_flow: bool,
    falloff: float,
) -> torch.Tensor | None:
    """Tokens `[B, N, D]` (or a picture `[B, C, H, W]`) with a Wiener filter over their grid.

    SeaCache's (2602.18993): the gain a S / (a^2 S + b^2) of each axis, S = |f|^-falloff with f in
    cycles per token, signal a and noise b of the step, keeps the frequencies that the noise level
    has resolved; its mean is made 1. Text beside the tokens is left out. None where it is not known
    how the tokens lie.
    """
    axes: tuple[int, ...] = (2, 3)
    picture = tokens.float()
    if tokens.dim() != 4:
        place = arrangement.fit(tokens.shape[1]) if arrangement and tokens.dim() == 3 else None
        if place is None:
            return None
        axes = (1, 2, 3)
        grid = (place.frames, place.height, place.width)
        picture = picture[:, place.before : place.before + place.video].unflatten(1, grid)
    spectrum = torch.fft.rfftn(picture, dim=axes)
    signal, noise = _signal_and_noise(step, is_flow)
    for axis in axes:
        # 1 / S in place of S, which is infinite at frequency 0.
        inverse = torch.fft.fftfreq(picture.shape[axis], dtype=torch.float64).abs() ** falloff
        gain = signal / (signal**2 + noise**2 * inverse)
        gain = (gain / gain.mean()).float()[: spectrum.shape[axis]]
        shape = [1] * spectrum.dim()
        shape[axis] = -1
        spectrum = spectrum * gain.to(spectrum.device).view(shape)
    sizes = [picture.shape[axis] for axis in axes]
    result: torch.Tensor = torch.fft.irfftn(spectrum, s=sizes, dim=axes)
    return result


def _signal_and_noise(step: Step, is_flow: bool) -> tuple[float, float]:
    """Shares of picture and noise in the latents."""
    if is_flow:
        return max(1.0 - step.sigma, 1e-6), max(step.sigma, 1e-6)
    if step.sigma < _LARGEST_SIGMA:
        size = math.hypot(1.0, step.sigma)
        return 1.0 / size, step.sigma / size
    # A timestep in place of a noise level: the cosine schedule is near enough.
    angle = step.noise_time * math.pi / 2
    return max(math.cos(angle), 1e-6), max(math.sin(angle), 1e-6)


def sums(current: torch.Tensor, reference: torch.Tensor, per_sample: bool) -> torch.Tensor:
    """(sum of differences, sum of magnitudes) `[samples or 1, 2]`, on the device."""
    if not per_sample or len(current) == 1:
        change: torch.Tensor = relative_change(current, reference)
        return change[None]
    pairs = zip(current, reference, strict=True)
    return torch.stack([relative_change(a, b) for a, b in pairs])


def chosen_rows(fresh: torch.Tensor, other: torch.Tensor | None, rows: Rows) -> torch.Tensor:
    """Samples of `fresh` where `rows` says so and of `other` elsewhere, if both have them."""
    if other is None or other.shape != fresh.shape or len(fresh) != len(rows):
        return fresh
    keep = torch.tensor(rows, device=fresh.device).view(-1, *(1,) * (fresh.dim() - 1))
    return torch.where(keep, fresh, other)


def token_sums(unit: "Unit") -> torch.Tensor:
    """The last two payloads summed over their tokens, newest first, `[2, B * C / 8]`.

    Of the first eighth of the channels: the last dimension of tokens, the second of pictures.
    """
    name = next(iter(unit.history[0].payload))
    both = torch.stack([anchor.payload[name] for anchor in (unit.history[0], unit.history[1])])
    if both.dim() > 4:
        both = both.movedim(2, -1)
    channels = max(1, both.shape[-1] // 8)
    return both[..., :channels].float().flatten(2, -2).sum(2).flatten(1)


def note_drift(
    branch: "Branch", payload: Values, older: Sequence[Values], weights: Sequence[float]
) -> None:
    """Compare a fresh payload with the last one, and with what reuse would have given instead.

    Estimated on a sample of the main stream; nothing is read from the device.
    older: the stored payloads, newest first, to which `weights` belong.
    """
    name, fresh = next(iter(payload.items()))
    history = [values.get(name) for values in older]
    anchors = [_sample(old) for old in history if old is not None and old.shape == fresh.shape]
    if len(anchors) != len(history):
        return
    sample = _sample(fresh)
    if not branch.deciders:
        branch.stats.changes.append(relative_change(sample, anchors[0]))
    predicted = torch.zeros_like(sample)
    for weight, anchor in zip(weights, anchors, strict=False):
        predicted.add_(anchor, alpha=weight)
    branch.stats.drift.append(relative_change(predicted, sample))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """An evenly strided view of about `SAMPLE` elements."""
    flat = tensor.reshape(-1)
    stride = max(1, flat.numel() // SAMPLE)
    return flat[:: stride + (stride > 1 and stride % 2 == 0)].float()


def nothing_reused(recipe: Recipe, stats: RunStats) -> str:
    """The words for a run that reused nothing, with the numbers seen."""
    online = [rule.policy for rule in recipe.rules if not isinstance(rule.policy, StaticPolicy)]
    if not online:
        return f"the run reused nothing: recipe {recipe.name!r} computed every step"
    policy = online[0]
    changes = sorted(c for branch in stats.branches for c in ratios(branch.changes))
    if isinstance(policy, Gate):
        changes = sorted(map(policy.rescaled, changes))
    seen = spread(changes)
    if seen is None:
        kind = f"signal {policy.signal!r}" if isinstance(policy, Gate) else type(policy).__name__
        return f"the run reused nothing: {kind} had nothing to compare; {_deciders(stats)}"
    what = "forecast errors" if isinstance(policy, Verified) else "changes"
    return (
        f"the run reused nothing: {what} seen {seen['min']:.3g} / {seen['median']:.3g} / "
        f"{seen['max']:.3g} (min / median / max), {_advice(policy, changes)}"
    )


def _deciders(stats: RunStats) -> str:
    counts: Counter[str] = Counter()
    for branch in stats.branches:
        counts.update(branch.decided)
    return "decided by " + ", ".join(f"{who} {count}x" for who, count in counts.most_common())


def _advice(policy: Policy, changes: Sequence[float]) -> str:
    useful = changes[int(0.3 * (len(changes) - 1))] * 1.001
    if isinstance(policy, Gate):
        allowed = f"threshold {policy.threshold:.3g}"
        return f"{allowed}; a threshold of {useful:.3g} would have reused about 30 %"
    if isinstance(policy, Verified):
        return f"at most {policy.threshold:.3g} is accepted; {useful:.3g} would do for about 30 %"
    if isinstance(policy, Codebook):
        longest = [limit for limit, interval in policy.table if interval > 1]
        least = f"reuses below {longest[-1]:.3g} per step" if longest else "never reuses"
        return f"the table {least}; {useful:.3g} would do for about 30 %"
    return f"{type(policy).__name__} computed every unit"
