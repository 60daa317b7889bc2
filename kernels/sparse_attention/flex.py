"""torch's compiled `flex_attention`, for whoever asks for it by name.

It runs where Triton's kernel of this folder does not (ROCm, XPU), at the price of a compilation for
every new length. Without compiling it would ignore the lists of blocks and attend to everything,
so it is never run that way.
"""

import functools
import shutil
from typing import Any

import torch
from torch import Tensor

from .ordering import all_in_order, out_of_order
from .plan import SparsePlan


def flex_objection(query: Tensor, plan: SparsePlan) -> str:
    """Why flex_attention cannot carry out this call, or an empty string."""
    try:
        from torch.nn.attention import flex_attention  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no flex_attention; it needs 2.5 or newer"
    if query.device.type == "cpu" and not shutil.which("g++") and not shutil.which("clang++"):
        return "on the CPU it needs a C++ compiler, and there is neither g++ nor clang++"
    if not isinstance(plan.q_blocks, int) or not isinstance(plan.k_blocks, int):
        return "it takes blocks of one size, and the plan's have offsets"
    return ""


def flex_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, scale: float
) -> tuple[Tensor, None]:
    """Sparse attention on `[B, H, S, D]`; the checks were made by the api. A new tensor."""
    q, k, v = all_in_order(query, key, value, plan)
    output: Tensor = _compiled()(q, k, v, block_mask=_block_mask(plan, q, k), scale=scale)
    return out_of_order(output, plan.q_order), None


def _block_mask(plan: SparsePlan, q: Tensor, k: Tensor) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    mask = plan.mask()
    chosen = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    counts = mask.sum(-1, dtype=torch.int32)
    # Every block is "full": no mask inside it. The list of partial ones is empty, and has to be
    # another tensor, or torch's C++ code generation fails.
    sizes = int(plan.q_blocks), int(plan.k_blocks)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(chosen), counts, chosen,
        BLOCK_SIZE=sizes, seq_lengths=(q.shape[2], k.shape[2]),
    )  # fmt: skip


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
