"""Which model this is and what it runs with: the mark on plans and traces."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from blockcache.engine.blocks import Blocks
from blockcache.engine.signals import adapter_state
from blockcache.engine.tracker import caller_of
from blockcache.engine.wiring import leaves
from blockcache.plan.plan import Fingerprint


def fingerprint(model: nn.Module, blocks: Blocks, sampler: str = "") -> Fingerprint:
    """What a plan for this model is marked with before anything is run."""
    # How its weights are stored does not make it another model, as little as their dtype does.
    config = {
        name: value
        for name, value in dict(getattr(model, "config", {})).items()
        if not name.startswith("_") and name != "quantization_config"
    }
    text = json.dumps(config, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    weights = next(model.parameters(), None)
    dtype = "" if weights is None else str(weights.dtype).removeprefix("torch.")
    return Fingerprint(type(model).__name__, digest, len(blocks), sampler, dtype)


def observed(
    model: nn.Module,
    blocks: Blocks,
    scheduler: Any,
    named: dict[str, Any],
    order: tuple[str, ...],
) -> Fingerprint:
    """The fingerprint with what the denoiser call under way shows of size, adapters and guidance.

    named: its arguments. order: the parameters of the denoiser's forward.
    """
    guidance = getattr(caller_of(model), "guidance_scale", None)
    return replace(
        fingerprint(model, blocks, type(scheduler).__name__),
        size=_sample_size(named, order),
        adapter=_adapter(model),
        guidance=float(guidance) if isinstance(guidance, (int, float)) else None,
    )


def _sample_size(named: dict[str, Any], order: tuple[str, ...]) -> tuple[int, ...]:
    for name in (*order, *named):
        for path, leaf in leaves(named.get(name)):
            if isinstance(leaf, torch.Tensor):
                # Samples of a list have no batch dimension of their own.
                return tuple(leaf.shape if path else leaf.shape[1:])
    return ()


def _adapter(model: nn.Module) -> str:
    state = adapter_state(model)
    if state is None:
        return ""
    active, scales, is_disabled = state
    shown = (f"{name} {scale:g}" for name, scale in scales if name in active)
    return "" if is_disabled is True else ", ".join(shown)
