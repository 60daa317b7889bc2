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

from .plan import SparsePlan


def flex_objection(query: Tensor, plan: SparsePlan, extras: dict[str, Any]) -> str:
    """Why flex_attention cannot carry out this call, or an empty string.

    extras: the options of `sparse_attention` beyond plan and scale; None or False where not used.
    """
    try:
        from torch.nn.attention import flex_attention  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no flex_attention; it needs 2.5 or newer"
    if query.device.type == "cpu" and not shutil.which("g++") and not shutil.which("clang++"):
        return "on the CPU it needs a C++ compiler, and there is neither g++ nor clang++"
    used = [name for name, value in extras.items() if value is not None and value is not False]
    if used:
        return f"it has no {', '.join(used)}"
    if not isinstance(plan.q_blocks, int) or not isinstance(plan.k_blocks, int):
        return "it takes blocks of one size, and the plan's have offsets"
    return ""


def flex_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, scale: float
) -> Tensor:
    """Sparse attention on `[B, H, S, D]`; the checks were made by the api. A new tensor."""
    shape = query.shape
    q, k, v = (
        _ordered(query, plan.q_order), _ordered(key, plan.k_order), _ordered(value, plan.k_order)
    )  # fmt: skip
    output: Tensor = _compiled()(q, k, v, block_mask=_block_mask(plan, q, k), scale=scale)
    if plan.q_order is None:
        return output
    back = plan.q_order.long().expand(*shape[:2], -1)[..., None].expand(shape)
    return torch.empty_like(output).scatter_(2, back, output)


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


def _ordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return tensor
    index = order.long().expand(*tensor.shape[:2], -1)
    return tensor.gather(2, index[..., None].expand(-1, -1, -1, tensor.shape[3]))


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
