"""The sparse kernel without a table."""

from torch import Tensor

from ..sparse_attention.kernel import sparse_attention_triton


def dense_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor | None,
    scale: float,
    key_lengths: Tensor | None = None,
) -> None:
    """Launch on `[B, H, S, D]` views and fill `output` and `lse`."""
    sparse_attention_triton(query, key, value, output, lse, None, scale, key_lengths=key_lengths)
