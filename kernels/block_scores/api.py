"""Scores of block pairs: checks, layout, and the choice of backend.

All scores are fp32 `[B, H, nQ, nK]`. Tensors go in as `[B, S, H, D]`,
or as `[B, H, S, D]` with layout "BHSD".
"""

import torch
from torch import Tensor

from ..common import check_qkv, check_scale, needs_grad, pick_backend, to_heads_first
from . import reference
from .reference import Pooled


def mean_pool(
    x: Tensor,
    blocks: int | Tensor,
    *,
    order: Tensor | None = None,
    with_similarity: bool = False,
    layout: str = "BSHD",
    backend: str | None = None,
) -> Pooled:
    """Mean of each block of tokens, over the tokens that the block really has.

    With `with_similarity` also the self-similarity of SpargeAttn (2502.18137): the mean cosine
    over all pairs in the block, got from the length of the mean unit vector without forming pairs.

    Args:
        x: `[B, S, H, D]`.
        blocks: Tokens per block, a power of two of at least 16 (the last block may be short), or
            int32 offsets `[B|1, H|1, n + 1]`.
        order: `[B|1, H|1, S]`; blocks are cut from `x` read in this order.
        with_similarity: Fill `Pooled.similarity`.
        layout: "BSHD" or "BHSD".
        backend: "torch", "triton" or None for the best that can run here.

    Returns:
        fp32 means `[B, H, n, D]` (0 for an empty block), similarities `[B, H, n]` in [-1, 1] (1
        for an empty block, 0 for zero vectors) and int32 sizes `[B|1, H|1, n]`.

    Raises:
        ValueError: Blocks that do not fit, a needed gradient, or a backend that cannot run.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be a 4-D float tensor.")
    x = to_heads_first(x, layout)
    _check_no_grad("mean_pool", x)
    _check_blocks(x, blocks, order)
    if pick_backend(backend, x) == "triton":
        from .kernel import mean_pool_triton

        return mean_pool_triton(x, blocks, order, with_similarity)
    return reference.mean_pool_torch(x, blocks, order, with_similarity)


def centroid_scores(
    query_means: Tensor,
    key_means: Tensor,
    *,
    scale: float | None = None,
    key_sizes: Tensor | None = None,
) -> Tensor:
    """Softmax over key blocks of the scores between block means: NABLA, SpargeAttn, VSA.

    With `key_sizes` each block weighs as its number of tokens, as SVG2 (2505.18875) weighs
    clusters. The matrices are small; torch is the fast path on every device.

    Args:
        query_means: `[B, H, nQ, D]`.
        key_means: `[B, H, nK, D]`.
        scale: Factor on the logits, above 0; None is `1 / sqrt(D)`.
        key_sizes: `[B|1, H|1, nK]`; a block of size 0 gets score 0. None weighs all alike.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if query_means.shape[:2] != key_means.shape[:2] or query_means.shape[3] != key_means.shape[3]:
        raise ValueError(
            f"query_means {tuple(query_means.shape)} and key_means {tuple(key_means.shape)} must "
            "be [B, H, nQ, D] and [B, H, nK, D]."
        )
    if key_sizes is not None and key_sizes.shape[-1] != key_means.shape[2]:
        raise ValueError(
            f"key_sizes is {tuple(key_sizes.shape)}; it must be [B|1, H|1, {key_means.shape[2]}]."
        )
    scale = check_scale(scale, query_means.shape[3])
    return reference.centroid_scores_torch(query_means, key_means, scale, key_sizes)


def antidiagonal_scores(
    query: Tensor,
    key: Tensor,
    *,
    stride: int = 8,
    block_q: int = 128,
    block_k: int = 128,
    scale: float | None = None,
    layout: str = "BSHD",
    backend: str | None = None,
) -> Tensor:
    """Attention mass of block pairs from sums along antidiagonals: XAttention (2503.16428).

    Queries and keys are cut in cells of `stride` tokens. The logit of two cells is the mean over
    their antidiagonal, which meets each row and column once; its softmax over key cells is summed
    per block. A cell that is cut short by the end repeats its last token and weighs as much less,
    where the published code pads with zeros that take mass.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, H, D]`.
        stride: Tokens per cell, a power of two from 2. Cost is `1 / stride` of the score half of
            dense attention, twice; 8 for video, 16 for speed, 64 is known to fail.
        block_q: Tokens per query block, a power of two and a multiple of `stride`.
        block_k: Tokens per key block, likewise.
        scale: Factor on the logits, above 0; None is `1 / sqrt(D)`.
        layout: "BSHD" or "BHSD".
        backend: "torch", "triton" or None for the best that can run here.

    Returns:
        fp32 `[B, H, nQ, nK]`; a row sums to the number of cells in its query block.

    Raises:
        ValueError: Sizes or shapes that do not fit, a needed gradient, or a backend that cannot
            run.
    """
    q, k, _ = check_qkv(query, key, key, layout)
    _check_no_grad("antidiagonal_scores", q, k)
    scale = check_scale(scale, q.shape[3])
    for name, size in (("stride", stride), ("block_q", block_q), ("block_k", block_k)):
        if size < 2 or size & (size - 1) or size % stride:
            raise ValueError(
                f"{name} is {size}; stride, block_q and block_k must be powers of two from 2, "
                f"blocks multiples of the stride ({stride})."
            )
    if pick_backend(backend, q) == "triton":
        from .kernel import antidiagonal_scores_triton

        return antidiagonal_scores_triton(q, k, stride, block_q, block_k, scale)
    return reference.antidiagonal_scores_torch(q, k, stride, block_q, block_k, scale)


def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    row_step: int = 1,
    scale: float | None = None,
    layout: str = "BSHD",
    backend: str | None = None,
) -> Tensor:
    """Exact attention mass of block pairs, given the LSE of each query: AdaSpa (2502.21079).

    `W[p, q]` is the sum of `exp(logit - LSE)` over queries in `p` and keys in `q`. With the LSE
    of an earlier step it is nearly exact for half the cost of dense attention. It also grades
    other scores.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, H, D]`.
        lse: fp32 `[B, H, Sq]`, natural logarithm, as the attention functions return it.
        block_q: Tokens per query block, a power of two of at least 16.
        block_k: Tokens per key block, likewise.
        row_step: Look at every `row_step`-th query of a block and scale up; a power of two. Cost
            falls in proportion.
        scale: Factor on the logits, above 0; None is `1 / sqrt(D)`.
        layout: "BSHD" or "BHSD".
        backend: "torch", "triton" or None for the best that can run here.

    Returns:
        fp32 `[B, H, nQ, nK]`; with the present LSE and row_step 1 a row sums to the number of its
        queries.

    Raises:
        ValueError: Sizes or shapes that do not fit, a needed gradient, or a backend that cannot
            run.
    """
    q, k, _ = check_qkv(query, key, key, layout)
    _check_no_grad("block_mass", q, k, lse)
    scale = check_scale(scale, q.shape[3])
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} is {size}; it must be a power of two of at least 16.")
    if row_step < 1 or row_step & (row_step - 1) or row_step > block_q:
        raise ValueError(
            f"row_step is {row_step}; it must be a power of two from 1 to block_q ({block_q})."
        )
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32 or lse.device != q.device:
        raise ValueError(
            f"lse is {lse.dtype} {tuple(lse.shape)} on {lse.device}; it must be float32 "
            f"{tuple(q.shape[:3])} on {q.device}."
        )
    if pick_backend(backend, q) == "triton":
        from .kernel import block_mass_triton

        return block_mass_triton(q, k, lse, block_q, block_k, row_step, scale)
    return reference.block_mass_torch(q, k, lse, block_q, block_k, row_step, scale)


def _check_no_grad(name: str, *tensors: Tensor) -> None:
    if needs_grad(*tensors):
        raise ValueError(
            f"{name} has no backward pass and a gradient is needed; call it under torch.no_grad()."
        )


def _check_blocks(x: Tensor, blocks: int | Tensor, order: Tensor | None) -> None:
    if isinstance(blocks, int):
        if blocks < 16 or blocks & (blocks - 1):
            raise ValueError(
                f"blocks is {blocks}; a size must be a power of two of at least 16, "
                "or give offsets."
            )
    elif blocks.dim() != 3 or blocks.dtype != torch.int32 or blocks.device != x.device:
        raise ValueError(
            f"blocks are {blocks.dtype} {tuple(blocks.shape)} on {blocks.device}; offsets must be "
            f"int32 [B|1, H|1, n + 1] on {x.device}."
        )
    for name, table in (("blocks", blocks), ("order", order)):
        if isinstance(table, Tensor) and any(
            have not in (1, want) for have, want in zip(table.shape[:2], x.shape[:2], strict=True)
        ):
            raise ValueError(
                f"{name} is {tuple(table.shape)}; its first sizes must be 1 or "
                f"{tuple(x.shape[:2])}."
            )
    if order is not None and (order.dim() != 3 or order.device != x.device):
        raise ValueError(
            f"order is {tuple(order.shape)} on {order.device}; it must be "
            f"[B|1, H|1, S] on {x.device}."
        )
