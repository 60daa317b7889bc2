"""How much attention mass a plan keeps, measured exactly on a few queries."""

import torch
from torch import Tensor

from blockcache.kernels.common import check_scale
from blockcache.kernels.sparse_attention.reference import token_mask
from blockcache.plan.geometry import Geometry
from blockcache.sparse.base import Context, Decision


def sampled_recall(
    decision: Decision,
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    context: Context,
    rows: int = 64,
) -> Tensor:
    """Mean share of the attention mass that is attended, fp32 `[B, H]`; 1 where dense.

    What stands for the rest, centroids or an earlier result, is not counted. The sample is evenly
    spaced over the video and the same on every call; text keys count as kept, padding not at all.
    Costs `rows / S` of dense attention.

    Args:
        decision: What `attend` decided for these tensors.
        q: `[B, H, S, D]`.
        k: `[B, H, S, D]`.
        geometry: Where video and text lie.
        context: For the scale.
        rows: Video queries to look at.
    """
    plan = decision.plan
    if plan is None:
        return q.new_ones(q.shape[:2], dtype=torch.float32)
    video = slice(geometry.before, geometry.before + geometry.video)
    rows = min(rows, geometry.video)
    # An offset that is no multiple of a block's size, or every sample would be a first token.
    sample = (torch.arange(rows, device=q.device) * geometry.video + geometry.video // 2) // rows
    kept = token_mask(plan, q.shape[0], q.shape[1], geometry.video, geometry.video, sample)
    scale = check_scale(context.scale, q.shape[3])
    padded = None
    if geometry.valid is not None:
        valid = torch.tensor(geometry.valid, device=q.device)
        padded = torch.arange(q.shape[2], device=q.device) >= valid[:, None]
    shares = []
    for h in range(q.shape[1]):
        logits = (q[:, h, video][:, sample].float() @ k[:, h].float().transpose(1, 2)) * scale
        if padded is not None:
            logits = logits.masked_fill(padded[:, None], -torch.inf)
        weights = logits.softmax(-1)
        left_out = weights[:, :, video].masked_fill(kept[:, h], 0.0).sum(-1)
        shares.append(1.0 - left_out.mean(-1))
    return torch.stack(shares, 1)
