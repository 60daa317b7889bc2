"""The small kernels against the torch paths that define them, on a GPU or in the interpreter."""

import pytest
import torch

from blockcache.kernels.block_scores import (
    antidiagonal_scores,
    assign_clusters,
    block_mass,
    kmeans,
    mean_pool,
)
from blockcache.kernels.dense_attention import dense_attention
from blockcache.kernels.linear_combine import linear_combine, relative_change
from blockcache.kernels.select import Count, MassBelow, MassKept, select_blocks
from kernel_toys import DTYPES, random_offsets, random_orders, rms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("with_base", [False, True])
def test_linear_combine(dtype, count, with_base, device):
    shape = (3, 7, 100)
    tensors = [torch.randn(shape).to(dtype).to(device) for _ in range(count)]
    weights = [0.5, -1.25, 3.0, 0.0][:count]
    base = torch.randn(shape).to(dtype).to(device) if with_base else None
    want = linear_combine(
        [t.double() for t in tensors], weights, None if base is None else base.double()
    )
    plain = linear_combine(tensors, weights, base, backend="torch")
    result = linear_combine(tensors, weights, base, backend="triton")
    assert result.dtype == dtype
    # The interpreter cuts fp32 to bf16 where a GPU rounds: up to twice the error.
    assert rms(result, want) <= max(1e-7, 2.5 * rms(plain, want))
    out = tensors[0]
    assert linear_combine(tensors, weights, base, out, backend="triton") is out
    assert torch.equal(out, result)


def test_linear_combine_refuses_what_it_cannot_fuse(device):
    x = torch.ones(4, 4, device=device)
    for tensors in ([x.t()[:, :2]], [x] * 5, [x.double()], [x.clone().requires_grad_()]):
        with pytest.raises(ValueError, match="1 to 4 contiguous"):
            linear_combine(tensors, [1.0] * len(tensors), backend="triton")


@pytest.mark.parametrize("most", [None, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relative_change(dtype, most, device):
    a, b = (torch.randn(37, 130).to(dtype).to(device) for _ in range(2))
    result = relative_change(a, b, most, backend="triton")
    assert rms(result, relative_change(a.double(), b.double(), most, backend="torch")) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["fixed", "ragged", "gather"])
def test_mean_pool(dtype, form, device):
    x = torch.randn(2, 75, 2, 40).to(dtype).to(device)
    x[:, :3] = 0
    blocks = 32 if form == "fixed" else random_offsets(1, 2, 75, 6, device)
    order = random_orders(2, 1, 75, device) if form == "gather" else None
    options = {"order": order, "with_similarity": True}
    result = mean_pool(x, blocks, backend="triton", **options)
    want = mean_pool(x, blocks, backend="torch", **options)
    assert rms(result.mean, want.mean) <= 1e-6
    assert rms(result.similarity, want.similarity) <= 1e-6
    assert torch.equal(result.sizes, want.sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("stride", "block_q", "block_k"), [(8, 32, 64), (4, 128, 16)])
def test_antidiagonal_scores(dtype, stride, block_q, block_k, device):
    q, k = (torch.randn(1, n, 2, 40).to(dtype).to(device) for n in (101, 150))
    options = {"stride": stride, "block_q": block_q, "block_k": block_k}
    result = antidiagonal_scores(q, k, backend="triton", **options)
    assert rms(result, antidiagonal_scores(q, k, backend="torch", **options)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("block_q", "block_k", "row_step"), [(128, 64, 1), (32, 128, 4), (16, 16, 16)]
)
def test_block_mass(dtype, block_q, block_k, row_step, device):
    q, k = (torch.randn(1, n, 2, 40).to(dtype).to(device) for n in (101, 150))
    lse = dense_attention(q, k, k, return_lse=True)[1]
    options = {"block_q": block_q, "block_k": block_k, "row_step": row_step}
    result = block_mass(q, k, lse, backend="triton", **options)
    assert rms(result, block_mass(q, k, lse, backend="torch", **options)) <= 2e-6


def test_assign_clusters_and_kmeans(device):
    x, centroids = (
        torch.randn(2, 70, 2, 24, device=device),
        torch.randn(2, 2, 40, 24, device=device),
    )
    labels = assign_clusters(x, centroids, backend="triton")
    distance = torch.cdist(x.transpose(1, 2).double(), centroids.double())
    chosen = distance.gather(-1, labels.long()[..., None])[..., 0]
    assert (chosen <= distance.min(-1).values + 1e-6).all()
    result, want = (kmeans(x, 5, 3, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(result.labels, want.labels)
    assert rms(result.centroids, want.centroids) <= 1e-6


@pytest.mark.parametrize("limits", [{"min_blocks": 0}, {"min_blocks": 9, "max_ratio": 0.3}])
@pytest.mark.parametrize("with_forced", [False, True])
@pytest.mark.parametrize("kind", ["random", "ties", "negative"])
def test_select_blocks(limits, with_forced, kind, device):
    scores = torch.rand(1, 2, 1, 40).square()
    scores[0, 1, 0, 5] = torch.nan
    if kind == "ties":
        scores = (scores * 3).round()
    elif kind == "negative":
        scores = scores - 0.5
    scores = scores.to(device)
    forced = (torch.rand(1, 1, 1, 40) < 0.2).to(device) if with_forced else None
    rules = [Count(torch.tensor([[7, 99]], device=device))]
    if kind != "negative":
        # No sum of a few scores that are multiples of 1/2 meets these shares.
        rules += [MassKept(torch.tensor([[0.8371, 1.0]], device=device)), MassBelow(0.7219)]
    for rule in rules:
        options = {"forced": forced, **limits}
        result = select_blocks(scores, rule, backend="triton", **options)
        assert torch.equal(result, select_blocks(scores, rule, backend="torch", **options))
