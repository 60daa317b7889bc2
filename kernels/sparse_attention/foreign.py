"""What other people's GPU kernels have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gpu_objection(query: Tensor, head_dims: Sequence[int]) -> str:
    """Why a GPU kernel for halves cannot take `[B, H, S, D]` queries, or an empty string."""
    if not query.is_cuda:
        return f"it runs on NVIDIA GPUs, and the tensors are on {query.device}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {query.dtype}"
    if query.shape[3] not in head_dims:
        return f"it takes heads of {', '.join(map(str, head_dims))}, not {query.shape[3]}"
    return ""
