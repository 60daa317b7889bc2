"""SpargeAttn's kernel with our plan, for whoever asks for it by name.

Its `block_sparse_sage2_attn_cuda` (2502.18137) computes `q . k` in int8 and the values in fp8, as
SageAttention 2 does: faster, and an error of its own on top of what a plan leaves out. Blocks are
128 queries by 64 keys, on Hopper 64 by 128; plans of larger blocks are cut into those.
"""

import importlib
import importlib.util

import torch
from torch import Tensor

from ..common import capability
from .foreign import gpu_objection
from .ordering import all_in_order, out_of_order
from .plan import SparsePlan

HEAD_DIMS = (64, 128)
SHORTEST = 128


def sparge_objection(query: Tensor, plan: SparsePlan) -> str:
    """Why SpargeAttn cannot carry out this call, or an empty string."""
    if importlib.util.find_spec("spas_sage_attn") is None:
        return "it is not installed (build it from github.com/thu-ml/SpargeAttn)"
    if reason := gpu_objection(query, HEAD_DIMS):
        return reason
    if query.shape[2] < SHORTEST:
        return f"it takes {SHORTEST} tokens and more, not {query.shape[2]}"
    sizes, wanted = (plan.q_blocks, plan.k_blocks), block_sizes(query)
    if not all(
        isinstance(size, int) and size % own == 0 for size, own in zip(sizes, wanted, strict=True)
    ):
        shown = " by ".join(str(s) if isinstance(s, int) else "offsets" for s in sizes)
        return f"its blocks here are {wanted[0]} queries by {wanted[1]} keys, the plan's {shown}"
    return ""


def block_sizes(query: Tensor) -> tuple[int, int]:
    """Queries and keys in a block of its kernel on this GPU."""
    return (64, 128) if capability(query) == 90 else (128, 64)


def sparge_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, scale: float
) -> tuple[Tensor, None]:
    """Sparse attention on `[B, H, S, D]`; the checks were made by the api. A new tensor."""
    q, k, v = all_in_order(query, key, value, plan)
    mask = plan.mask().expand(*query.shape[:2], -1, -1)
    theirs = importlib.import_module("spas_sage_attn")
    output = theirs.block_sparse_sage2_attn_cuda(
        q, k, v, mask_id=_cut(mask, plan, q, k), scale=scale, tensor_layout="HND"
    )
    # What it writes where nothing is attended is its own.
    is_empty = ~mask.any(-1).repeat_interleave(int(plan.q_blocks), 2)[:, :, : q.shape[2]]
    output = output.to(query.dtype).masked_fill(is_empty[..., None], 0.0)
    return out_of_order(output, plan.q_order), None


def _cut(mask: Tensor, plan: SparsePlan, q: Tensor, k: Tensor) -> Tensor:
    """The mask in its kernel's blocks, int8 and contiguous."""
    rows, columns = block_sizes(q)
    mask = mask.repeat_interleave(int(plan.q_blocks) // rows, 2)
    mask = mask.repeat_interleave(int(plan.k_blocks) // columns, 3)
    # The last block may be shorter than it could be.
    n_q, n_k = -(-q.shape[2] // rows), -(-k.shape[2] // columns)
    return mask[:, :, :n_q, :n_k].to(torch.int8).contiguous()
