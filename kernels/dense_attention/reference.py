"""The torch path: torch's own attention, or the scores written out where the LSE is asked for."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    return_lse: bool,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, Sq, D]` and the LSE or None, for `[B, H, S, D]` views."""
    if not return_lse and key_lengths is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale), None
    wide = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    allowed = None
    if key_lengths is not None:
        allowed = torch.arange(key.shape[2], device=key.device) < key_lengths[:, None]
        # What lies beyond the length may be anything; weight 0 times NaN would be NaN.
        value = torch.where(allowed[:, None, :, None], value, 0)
    # One head at a time: the scores of all heads rarely fit.
    for h in range(query.shape[1]):
        # In fp32 also for 16-bit inputs: rounded scores would make an LSE of three digits.
        scores = (query[:, h].to(wide) @ key[:, h].to(wide).transpose(1, 2)) * scale
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        lse[:, h] = scores.logsumexp(-1)
        weights = scores.softmax(-1).nan_to_num(0.0) if allowed is not None else scores.softmax(-1)
        output[:, h] = weights.to(value.dtype) @ value[:, h]
    return output, lse if return_lse else None
