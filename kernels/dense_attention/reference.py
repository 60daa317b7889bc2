"""The torch path: torch's own attention, or the scores written out where it gives no LSE."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import CPU_FLASH


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
    if not query.is_cuda and CPU_FLASH is not None and query.numel():
        lengths = None if key_lengths is None else key_lengths.tolist()
        output, lse = _flash(query, key, value, scale, lengths)
        return output, lse.float() if return_lse else None
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


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: list[int] | None
) -> tuple[Tensor, Tensor]:
    """Output and LSE on a CPU; entries of a batch one by one where their lengths differ."""
    if lengths is None:
        return CPU_FLASH(query, key, value, 0.0, False, scale=scale)
    output = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, device=query.device)
    for b, length in enumerate(lengths):
        if length > 0:
            k, v = key[b : b + 1, :, :length], value[b : b + 1, :, :length]
            o, s = CPU_FLASH(query[b : b + 1], k, v, 0.0, False, scale=scale)
            output[b], lse[b] = o[0], s[0]
    return output, lse
