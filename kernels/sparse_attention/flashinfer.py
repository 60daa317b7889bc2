"""FlashInfer's block-sparse attention, for whoever asks for it by name.

Its `VariableBlockSparseAttentionWrapper` takes a mask for each head and blocks of any lengths; what
is [B, H] here is one row of heads there. It makes a plan of its own for every mask, which reads the
mask back to the host: fine for a comparison, a stall in every layer of a pipeline.
"""

import functools
import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from .foreign import gpu_objection
from .ordering import all_in_order, out_of_order
from .plan import SparsePlan, merge_states
from .reference import block_of_token

HEAD_DIMS = (64, 128, 256)
# What its documentation recommends for partial results.
WORKSPACE_BYTES = 128 << 20


def flashinfer_objection(query: Tensor, plan: SparsePlan) -> str:
    """Why FlashInfer cannot carry out this call, or an empty string."""
    if importlib.util.find_spec("flashinfer") is None:
        return "it is not installed (pip install flashinfer-python)"
    return gpu_objection(query, HEAD_DIMS)


def flashinfer_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SparsePlan,
    scale: float,
    *,
    return_lse: bool = False,
    initial: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sparse attention on `[B, H, S, D]`; the checks were made by the api.

    Returns:
        Output `[B, H, Sq, D]`, and the LSE (natural, fp32 `[B, H, Sq]`) where asked for.
    """
    batch, heads, length, head_dim = query.shape
    q, k, v = (
        t.reshape(batch * heads, -1, head_dim) for t in all_in_order(query, key, value, plan)
    )
    mask = plan.mask().expand(batch, heads, -1, -1).flatten(0, 1)
    rows, columns = (
        plan.sizes(side, x.shape[1]).expand(batch, heads, -1).flatten(0, 1).to(torch.int32)
        for side, x in (("q", q), ("k", k))
    )
    wrapper = _wrapper(query.device)
    wrapper.plan(
        mask.contiguous(), rows.contiguous(), columns.contiguous(), batch * heads, batch * heads,
        head_dim, sm_scale=scale, q_data_type=query.dtype,
    )  # fmt: skip
    output, lse2 = wrapper.run(q, k, v, return_lse=True)
    # Its log-sum-exp is to the base of 2. What it writes where nothing is attended is its own.
    is_empty = ~(mask & (columns > 0)[:, None]).any(-1)
    block = block_of_token(plan.q_blocks, None, length, plan.num_q_blocks)
    is_empty = is_empty.gather(1, block.expand(batch, heads, -1).flatten(0, 1).to(mask.device))
    output = output.masked_fill(is_empty[..., None], 0.0).view(query.shape)
    lse = (lse2 * math.log(2)).masked_fill(is_empty, -torch.inf).view(batch, heads, length)
    output, lse = out_of_order(output, plan.q_order), out_of_order(lse, plan.q_order)
    if initial is not None:
        merged, lse = merge_states(output, lse, *initial)
        output = merged.to(query.dtype)
    return output, lse if return_lse else None


@functools.cache
def _wrapper(device: torch.device) -> Any:
    """One for each GPU, with its workspace, for as long as the process lives."""
    theirs = importlib.import_module("flashinfer")
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return theirs.VariableBlockSparseAttentionWrapper(workspace)
