"""What the kernel tests share: random plans, float64 answers, and derived tolerances."""

import torch
from torch import Tensor

from blockcache.kernels.sparse_attention import Centroids, SparsePlan
from blockcache.kernels.sparse_attention.reference import sparse_attention_reference

HEAD_DIMS = (64, 72, 80, 96, 112, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rms(result: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact values; inf for NaN or a wrong shape."""
    if result.shape != exact.shape or not torch.isfinite(result).all():
        return float("inf")
    size = exact.double().norm()
    return ((result.double() - exact.double()).norm() / size.clamp_min(1e-300)).item()


def random_offsets(batch: int, heads: int, length: int, blocks: int, device: str = "cpu") -> Tensor:
    """Blocks of any lengths; with few tokens per block some are empty."""
    inner = torch.randint(0, length + 1, (batch, heads, blocks - 1)).sort(-1).values
    ends = torch.nn.functional.pad(inner, (1, 0)), torch.full((batch, heads, 1), length)
    return torch.cat(ends, -1).int().to(device)


def random_orders(batch: int, heads: int, length: int, device: str = "cpu") -> Tensor:
    """A permutation per head."""
    return torch.rand(batch, heads, length).argsort(-1).int().to(device)


def random_plan(
    batch: int, heads: int, q_length: int, k_length: int, *, ragged: bool = False,
    order: bool = False, sizes: tuple[int, int] = (32, 16), density: float = 0.5,
    device: str = "cpu",
) -> SparsePlan:  # fmt: skip
    """A plan whose first row is empty; with `order` tables shared by heads or batch appear too."""
    if ragged:
        q_blocks = random_offsets(batch, heads, q_length, 4, device)
        k_blocks = random_offsets(1, heads, k_length, 6, device)
        rows, columns = 4, 6
    else:
        q_blocks, k_blocks = sizes
        rows, columns = -(-q_length // q_blocks), -(-k_length // k_blocks)
    mask = torch.rand(batch, heads, rows, columns) < density
    mask[0, 0, 0] = False
    return SparsePlan.from_mask(
        mask.to(device), q_blocks, k_blocks,
        random_orders(1, heads, q_length, device) if order else None,
        random_orders(batch, 1, k_length, device) if order else None,
    )  # fmt: skip


def qkv(
    batch: int, heads: int, q_length: int, k_length: int, head_dim: int,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Random query, key and value, `[B, S, H, D]`."""
    return tuple(
        torch.randn(batch, length, heads, head_dim).to(dtype).to(device)
        for length in (q_length, k_length, k_length)
    )


def random_extras(plan: SparsePlan, query: Tensor) -> tuple[tuple[Tensor, Tensor], Centroids]:
    """An earlier result, unknown for one head, and centroids, some of which stand for no token."""
    batch, length, heads, head_dim = query.shape
    device, dtype = query.device, query.dtype
    lse = torch.randn(batch, heads, length)
    lse[0, -1] = -torch.inf
    shape = (batch, heads, plan.num_k_blocks, head_dim)
    centroids = Centroids(
        torch.randn(shape).to(dtype).to(device), torch.randn(shape).to(dtype).to(device),
        torch.randint(0, 4, (batch, heads, plan.num_k_blocks)).to(device),
    )  # fmt: skip
    return (torch.randn(query.shape).to(dtype).to(device), lse.to(device)), centroids


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, *,
    dtype: torch.dtype = torch.float64,
    scale: float | None = None, initial: tuple[Tensor, Tensor] | None = None, **extras: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sparse_attention` of `[B, S, H, D]` with every pair written out; output and LSE."""
    if initial is not None:
        initial = (initial[0].transpose(1, 2), initial[1])
    output, lse = sparse_attention_reference(
        *(t.transpose(1, 2) for t in (query, key, value)), plan,
        query.shape[-1] ** -0.5 if scale is None else scale, initial, dtype=dtype, **extras,
    )  # fmt: skip
    return output.transpose(1, 2), lse


def check_attention(
    result: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan,
    **extras: object,
) -> None:  # fmt: skip
    """Output and LSE against float64: 1e-6 for fp32, else twice the reference's own error."""
    output, lse = result
    exact, exact_lse = exact_attention(query, key, value, plan, **extras)
    if query.dtype == torch.float32:
        budget = 1e-6
    else:
        budget = 2 * rms(
            exact_attention(query, key, value, plan, dtype=query.dtype, **extras)[0], exact
        )
    assert output.dtype == query.dtype
    assert output.shape == query.shape
    assert rms(output, exact) <= budget
    known = exact_lse > -torch.inf
    assert torch.equal(known, lse > -torch.inf)
    # For 16 bits torch's CPU attention takes a quicker, coarser exponential.
    assert rms(lse[known], exact_lse[known]) <= (1e-6 if query.dtype == torch.float32 else 5e-6)
    nothing = ~known.transpose(1, 2)
    assert (output[nothing] == 0).all()
