"""Lets the heads that look one frame ahead or back follow the motion that the caption names.

What moves a token a frame is, one frame on, one token further, and looks the same there. A head
that looks there sees the same thing twice. Training alone did not find this in 2800 steps: heads
kept looking at the same place, and moving objects became streaks. Yet the motion could be read
linearly from the inputs of nearly all queries (99 % of clips). So the query's rotary channels,
which say where a head looks, are set to the linear function of its input that comes nearest to the
right shift for each motion. Training goes on from there.
"""

from collections.abc import Callable
from typing import Any

import torch

from blockcache.pipelines.embedded import video_pipeline, world_video
from blockcache.pipelines.embedded.world_video import MOTIONS

_TEMPORAL_HEAD = 1
_RIDGE = 0.02
_LEAST_READABLE = 0.6


@torch.no_grad()
def motion_queries(
    transformer: Any, forward: Callable[[], object], motion: torch.Tensor
) -> dict[str, torch.Tensor]:
    """New weights and biases of ``to_q`` by name, for all layers whose inputs tell the motion.

    forward: Runs the transformer on a batch of clips. motion: Their motions, ``[batch]``, indices
    into MOTIONS.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        block.attn1.to_q.register_forward_hook(
            lambda module, args, out: seen.append((args[0].float(), out.float()))
        )
        for block in transformer.blocks
    ]
    forward()
    for hook in hooks:
        hook.remove()
    state = transformer.state_dict()
    changed: dict[str, torch.Tensor] = {}
    for layer, (inputs, queries) in enumerate(seen):
        mean, read, share = _read_motion(inputs, motion)
        if share < _LEAST_READABLE:
            continue
        rows, wanted = _shifted(queries.flatten(0, 1).mean(0), layer)
        name = f"blocks.{layer}.attn1.to_q"
        weight, bias = state[f"{name}.weight"].clone(), state[f"{name}.bias"].clone()
        prior = torch.nn.functional.one_hot(motion, len(MOTIONS)).float().mean(0)
        weight[rows] = (read @ wanted).T
        bias[rows] = prior @ wanted - weight[rows] @ mean
        changed |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return changed


def _read_motion(
    inputs: torch.Tensor, motion: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Linear functions that are 1 for one motion and 0 for others, less the share of each.

    Returns the mean input ``[width]``, the functions ``[width, motions]`` and the share of clips
    that they tell right.
    """
    mean = inputs.mean((0, 1))
    centred = (inputs - mean).flatten(0, 1)
    one_hot = torch.nn.functional.one_hot(motion, len(MOTIONS)).float()
    target = (one_hot - one_hot.mean(0)).repeat_interleave(inputs.shape[1], 0)
    power = centred.T @ centred / len(centred)
    power += _RIDGE * power.diagonal().mean() * torch.eye(len(power))
    read = torch.linalg.solve(power, centred.T @ target / len(centred))
    told = (inputs.mean(1) - mean) @ read + one_hot.mean(0)
    return mean, read, float((told.argmax(1) == motion).float().mean())


def _shifted(query: torch.Tensor, layer: int) -> tuple[list[int], torch.Tensor]:
    """Rows of the rotary channels of the temporal head, and what they should be for each motion.

    Returns the rows and values ``[motions, rows]``: the mean ``query`` turned by the shift.
    """
    ahead = video_pipeline.HEAD_KERNELS[layer][_TEMPORAL_HEAD][0]
    steps = torch.cat([world_video.DIRECTIONS, torch.zeros(2, 2)])
    rows: list[int] = []
    values = []
    # Rows of tokens count downwards.
    shifts = (
        (video_pipeline.ROW_CHANNELS, -ahead * steps[:, 1]),
        (video_pipeline.COLUMN_CHANNELS, ahead * steps[:, 0]),
    )
    for channels, shift in shifts:
        for pair in range(video_pipeline.AIMED_PAIRS):
            row = _TEMPORAL_HEAD * video_pipeline.HEAD_SIZE + channels.start + 2 * pair
            angle = 10000 ** (-2 * pair / len(channels)) * shift
            cos, sin = angle.cos(), angle.sin()
            x, y = query[row], query[row + 1]
            values += [x * cos - y * sin, x * sin + y * cos]
            rows += [row, row + 1]
    return rows, torch.stack(values, 1)
