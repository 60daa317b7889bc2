"""`dense_attention`: checks, layout, and the choice of backend."""

from torch import Tensor

from ..common import (
    allocate,
    as_layout,
    check_lengths,
    check_qkv,
    check_scale,
    needs_grad,
    pick_backend,
)
from .reference import dense_attention_torch


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    layout: str = "BSHD",
    return_lse: bool = False,
    key_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to every key, by the loop of the sparse kernel or by torch.

    There for two things: the log-sum-exp, which torch's own function does not return, and an honest
    baseline for `sparse_attention`, the same loop with nothing left out.

    Args:
        query: `[B, Sq, H, D]`, fp32, fp16 or bf16. The Triton backend takes D up to 128.
        key: `[B, Sk, H, D]`, Sk at least 1.
        value: `[B, Sk, H, D]`.
        scale: Factor on the logits, above 0; None is `1 / sqrt(D)`.
        layout: "BSHD", or "BHSD" for tensors `[B, H, S, D]`.
        return_lse: Also return the log-sum-exp of the logits, natural logarithm, fp32 `[B, H, Sq]`.
        key_lengths: int32 or int64 `[B]`; keys at and after this position are left out. Length 0
            gives output 0 and LSE -inf.
        backend: "torch", "triton" or None for the best that can run here.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, a needed gradient, or a backend that
            cannot run.
    """
    q, k, v = check_qkv(query, key, value, layout)
    scale = check_scale(scale, q.shape[3])
    check_lengths(key_lengths, q)
    if k.shape[2] < 1:
        raise ValueError(f"key is {tuple(key.shape)}; it needs at least one token.")
    if needs_grad(query, key, value):
        raise ValueError(
            "dense_attention has no backward pass and a gradient is needed; call it under "
            "torch.no_grad(), or use torch.nn.functional.scaled_dot_product_attention."
        )
    if pick_backend(backend, q) == "triton":
        from .kernel import dense_attention_triton

        output, lse = allocate(q, layout, return_lse)
        dense_attention_triton(q, k, v, output, lse, scale, key_lengths)
    else:
        output, lse = dense_attention_torch(q, k, v, scale, return_lse, key_lengths)
    return as_layout(output, lse, layout)
