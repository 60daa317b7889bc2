"""Which processes share one sample: statistics are summed over these, and over no others.

Ranks that render different pictures have nothing to do with each other's decisions; ranks that
split one picture's tokens must decide alike, or they wait for each other for ever.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from blockcache.errors import PlanError
from blockcache.plan.geometry import Geometry


def group_of(denoiser: nn.Module) -> Any:
    """The group of diffusers' context parallelism on `denoiser`, or None where there is none."""
    config = getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    return None if mesh is None else mesh.get_group()


def gathered_order(geometry: Geometry, group: Any) -> torch.Tensor | None:
    """Where each token lies in a sequence that a group has put together; None: in its place.

    Every rank brings its share of the text and of the video, and attention sees one rank's tokens
    after the other's: text, video, text, video.

    Raises:
        PlanError: the ranks' shares are not equal.
    """
    world = 1 if group is None else dist.get_world_size(group)
    if world == 1 or not geometry.others:
        return None
    parts = (geometry.before, geometry.video, geometry.after)
    if any(part % world for part in parts):
        raise PlanError(f"{parts} tokens of text, video and text on {world} processes")
    ranks = torch.arange(geometry.tokens).view(world, -1)
    shares = ranks.split([part // world for part in parts], dim=1)
    return torch.cat([share.flatten() for share in shares])


def summed(sums: torch.Tensor, group: Any) -> torch.Tensor:
    """`sums` added up over the ranks of the group."""
    if group is None:
        return sums
    total = sums.clone()
    dist.all_reduce(total, group=group)
    return total


def as_split(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as `module` gets them where diffusers splits the tokens on entering it.

    Some models (Wan) are split at their first block and not before it.
    """
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    for name, hook in hooks.items():
        if name.startswith("cp_input"):
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return args, kwargs
