"""Re-ttention (2505.22918): correct the softmax of a sparse mask with a ratio from a dense step.

At a refresh, everything is computed and two things are remembered: rho, the share of each query's
softmax that the kept keys have, and the residual, the exact contribution of all the others. In
between only kept keys are attended: output = rho * (softmax over kept keys) + residual, and rho
grows by a constant per step. Kept: all of this, and the static band inside frames. Different: rho
comes from two log-sum-exps instead of two written-out matrices, and is not let above 1; the
residual is stored in front of the output projection, per head; the band is cut into blocks.
"""

import functools
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from blockcache.kernels.sparse_attention import SparsePlan
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import spec
from blockcache.sparse.base import Card, Context, Decision, Planner, State
from blockcache.sparse.pieces import Block, Positive, Share, pack
from blockcache.sparse.remainder import Kept, Remembering, around, attend_rest, output_bytes
from blockcache.sparse.tilings import Tiling


@spec
class FrameBand(Planner):
    """A band around the same place in every frame.

    density: width of the band as a share of the frame; published 0.03125. Every block that the band
    touches is kept whole. block: tokens per block; frames are cut separately.
    """

    density: Share = 0.03125
    block: Block = 64

    card: ClassVar[Card] = Card("2505.22918", "frame by frame", "none (static)", "band in frames")

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """The same for every call with this geometry."""
        return Decision(_band(self, geometry.bare, q.device))


@functools.lru_cache(maxsize=16)
def _band(planner: FrameBand, geometry: Geometry, device: torch.device) -> SparsePlan:
    frame, size = geometry.frame, planner.block
    reach = int(frame * planner.density) // 2
    first = torch.arange(0, frame, size)
    last = (first + size).clamp_max(frame) - 1
    inside = (first[:, None] - last <= reach) & (first - last[:, None] <= reach)
    mask = inside.repeat(geometry.frames, geometry.frames)
    blocks: int | Tensor = size
    if frame % size:
        starts = (torch.arange(geometry.frames)[:, None] * frame + first).flatten()
        ends = torch.cat((starts, torch.tensor([geometry.video])))
        blocks = ends.to(torch.int32)[None, None].to(device)
    return pack(mask[None, None].to(device), Tiling(None, blocks, (len(mask), 1, 1)))


@spec
class Rettention(Remembering):
    """Statistics of a dense step reshape what a sparse mask gives.

    kept: which keys are attended in every step. every: steps between refreshes, published 5. drift:
    what rho grows by at each step in between, published 0.04.
    """

    kept: Kept = FrameBand()
    every: Positive = 5
    drift: Annotated[float, Field(ge=0, le=1)] = 0.04

    card: ClassVar[Card] = Card(
        "2505.22918", "", "", "", remainder="rho and residual", state="residual, rho, mask"
    )

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """The kept keys; at a refresh the others too, once."""
        if not state.is_due(self.every, context) and state.plan is not None:
            return Decision(state.plan)
        chosen = self.kept.plan(q, k, v, geometry, state.nested(), context)
        if chosen.plan is None:
            return chosen
        output, lse = attend_rest(chosen.plan, q, k, v, context)
        state.tensors = {"rest": output, "rest_lse": lse}
        state.plan, state.refreshed = chosen.plan, context.step.index
        return Decision(chosen.plan, need_lse=True, refreshed=True)

    def finish(self, output: Tensor, lse: Tensor | None, state: State, context: Context) -> Tensor:
        """Scale by rho and add the residual, both measured right now at a refresh."""
        held = state.tensors
        if lse is not None:
            total = torch.logaddexp(lse, held["rest_lse"])
            share = (held.pop("rest_lse") - total).exp()[..., None]
            held["residual"] = (held.pop("rest") * share).to(output.dtype)
            held["rho"] = (lse - total).exp()
            rho = held["rho"]
        else:
            rho = held["rho"]
            held["rho"] = (rho + self.drift).clamp_max(1.0)
        return (output * rho[..., None] + held["residual"]).to(output.dtype)

    def state_bytes(
        self, geometry: Geometry, batch: int, heads: int, head_dim: int, itemsize: int
    ) -> int:
        """As much as the output, rho in fp32, and the mask."""
        return output_bytes(self.kept, geometry, batch, heads, head_dim, itemsize)

    def describe(self) -> Card:
        """What is kept is the inner planner's choice."""
        return around(self.card, self.kept)
