"""Scores against what they are defined to be, pair by pair in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.kernels.block_scores import (
    antidiagonal_scores,
    assign_clusters,
    block_mass,
    centroid_scores,
    kmeans,
    mean_pool,
    profile_plans,
)
from blockcache.kernels.dense_attention import dense_attention
from blockcache.kernels.select import Count, select_blocks
from blockcache.kernels.sparse_attention import SparsePlan, sparse_attention
from kernel_toys import DTYPES, qkv, random_offsets, random_orders, random_plan, rms


def weights_of(q, k, scale=None):
    """Exact attention weights `[B, H, Sq, Sk]` of `[B, S, H, D]`."""
    q, k = (t.transpose(1, 2).double() for t in (q, k))
    return (q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)


def block_sums(weights, block_q, block_k):
    """Sum of each block of pairs, short ones at the ends included."""
    rows = [part.sum(2) for part in weights.split(block_q, 2)]
    return torch.stack(
        [torch.stack([p.sum(-1) for p in row.split(block_k, 2)], -1) for row in rows], 2
    )


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 90), ragged=st.booleans(), order=st.booleans(),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_mean_pool(length, ragged, order, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, length, 2, 8).to(dtype)
    blocks = random_offsets(1, 2, length, 5) if ragged else 16
    orders = random_orders(2, 1, length) if order else None
    pooled = mean_pool(x, blocks, order=orders, with_similarity=True)
    for b in range(2):
        for h in range(2):
            rows = x[b, :, h].double()
            rows = rows if orders is None else rows[orders[b, 0].long()]
            edges = blocks[0, h].tolist() if ragged else [*range(0, length, 16), length]
            for i, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
                mean, similarity = torch.zeros(8).double(), 1.0
                if end > first:
                    mean = rows[first:end].mean(0)
                    unit = torch.nn.functional.normalize(rows[first:end], dim=-1)
                    similarity = (unit @ unit.T).mean().item()
                assert torch.allclose(pooled.mean[b, h, i].double(), mean, atol=1e-6)
                assert pooled.similarity[b, h, i].item() == pytest.approx(similarity, abs=1e-6)
                assert pooled.sizes[0, h if ragged else 0, i] == end - first


def test_centroid_scores_by_hand():
    q, k = torch.tensor([[[[2.0]]]]), torch.tensor([[[[0.0], [1.0], [5.0]]]])
    e = torch.tensor([0.0, 1.0, 5.0]).exp()
    assert torch.allclose(centroid_scores(q, k, scale=0.5)[0, 0, 0], e / e.sum())
    sized = torch.tensor([3.0, 1.0, 0.0]) * e
    result = centroid_scores(q, k, scale=0.5, key_sizes=torch.tensor([[[3, 1, 0]]]))
    assert torch.allclose(result[0, 0, 0], sized / sized.sum())


@pytest.mark.parametrize("stride", [2, 8])
def test_antidiagonal_scores_against_loops(stride):
    """The definition, one pair at a time, for lengths that cells divide."""
    q, k = torch.randn(1, 32, 1, 4), torch.randn(1, 48, 1, 4)
    logits = torch.zeros(32 // stride, 48 // stride, dtype=torch.float64)
    for m in range(logits.shape[0]):
        for n in range(logits.shape[1]):
            pairs = [
                q[0, m * stride + stride - 1 - t, 0].double() @ k[0, n * stride + t, 0].double()
                for t in range(stride)
            ]
            logits[m, n] = sum(pairs) / stride * 0.5
    want = block_sums(logits.softmax(-1)[None, None], 16 // stride, 16 // stride)
    result = antidiagonal_scores(q, k, stride=stride, block_q=16, block_k=16)
    assert rms(result, want) <= 1e-6


def test_antidiagonal_cells_cut_short_weigh_less():
    """With all logits equal, mass is the share of tokens; padding gets none."""
    q, k = torch.zeros(1, 20, 1, 4), torch.randn(1, 37, 1, 4)
    result = antidiagonal_scores(q, k, stride=8, block_q=16, block_k=16)
    share = torch.tensor([16, 16, 5]) / 37
    assert torch.allclose(result[0, 0], torch.stack((2 * share, 0.5 * share)), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    q_length=st.integers(1, 70), k_length=st.integers(1, 70), step=st.sampled_from([1, 2, 16]),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_block_mass(q_length, k_length, step, dtype):
    q, k, _ = qkv(1, 2, q_length, k_length, 16, dtype)
    weights = weights_of(q, k)
    lse = (q.transpose(1, 2).double() @ k.permute(0, 2, 3, 1).double() / 4).logsumexp(-1).float()
    result = block_mass(q, k, lse, block_q=32, block_k=16, row_step=step)
    parts = []
    for part in weights.split(32, 2):
        seen = part[:, :, ::step]
        parts.append(block_sums(seen, 32, 16) * (part.shape[2] / seen.shape[2]))
    assert rms(result, torch.cat(parts, 2)) <= 2e-6
    lengths = torch.tensor([min(32, q_length - i) for i in range(0, q_length, 32)])
    assert torch.allclose(result.sum(-1), lengths.float().expand(1, 2, -1), rtol=1e-5)


def test_exact_mass_finds_more_than_estimates():
    """On structured input the exact mass recalls most, and both estimates far more than chance."""
    length, block = 512, 16
    position = torch.linspace(0, 12, length)
    features = torch.cat(
        [torch.stack((torch.cos(f * position), torch.sin(f * position)), -1) for f in (1, 2, 3, 5)],
        -1,
    )
    q, k = (3 * features[None, :, None] + 0.3 * torch.randn(1, length, 2, 8) for _ in range(2))
    weights = weights_of(q, k)
    mass = block_sums(weights, block, block)
    lse = dense_attention(q, k, k, return_lse=True)[1]

    def recall(scores):
        mask = select_blocks(scores, Count(6))
        return ((mass * mask).sum() / mass.sum()).item()

    exact = recall(block_mass(q, k, lse, block_q=block, block_k=block))
    diagonal = recall(antidiagonal_scores(q, k, stride=8, block_q=block, block_k=block))
    means = (mean_pool(t, block).mean for t in (q, k))
    pooled = recall(centroid_scores(*means))
    assert exact >= diagonal >= 0.9 * exact
    assert exact >= pooled >= 0.8 * exact
    assert exact > 4 * 6 / 32


def test_assign_clusters_takes_the_nearest():
    x, centroids = torch.randn(2, 50, 3, 8), torch.randn(2, 3, 7, 8)
    distances = torch.cdist(x.transpose(1, 2), centroids)
    assert torch.equal(assign_clusters(x, centroids).long(), distances.argmin(-1))
    # The first of equally near ones.
    assert (assign_clusters(x, centroids[:, :, :1].expand(-1, -1, 4, -1)) == 0).all()


def test_kmeans_improves_and_describes_its_clusters():
    x = torch.randn(2, 120, 2, 6)
    before = torch.inf
    for iterations in (1, 2, 4, 8):
        c = kmeans(x, 9, iterations)
        picked = c.centroids.gather(2, c.labels.long()[..., None].expand(-1, -1, -1, 6))
        inertia = (x.transpose(1, 2) - picked).square().sum().item()
        assert inertia <= before + 1e-4
        before = inertia
    assert torch.equal(c.sizes.sum(-1), torch.full((2, 2), 120, dtype=torch.int32))
    assert torch.equal(c.offsets.diff(dim=-1), c.sizes)
    ordered = c.labels.gather(-1, c.order)
    assert torch.equal(ordered, ordered.sort(-1).values)
    for cluster in range(9):
        rows = x[0, c.labels[0, 1] == cluster, 1]
        assert torch.allclose(c.centroids[0, 1, cluster], rows.mean(0), atol=1e-5)


def test_an_empty_cluster_keeps_its_centroid():
    x = torch.zeros(1, 10, 1, 4)
    start = torch.tensor([[[[0.0] * 4, [9.0] * 4]]])
    c = kmeans(x, start, 3)
    assert c.sizes[0, 0].tolist() == [10, 0]
    assert torch.equal(c.centroids, start)


def test_clusters_make_a_plan():
    """Clusters of queries and keys go into SparsePlan as they are; all of them chosen is dense."""
    q, k, v = qkv(2, 2, 60, 80, 16)
    a, b = kmeans(q, 5, 3), kmeans(k, 7, 3)
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    plan = SparsePlan.from_mask(mask, a.offsets, b.offsets, a.order, b.order)
    assert rms(sparse_attention(q, k, v, plan), dense_attention(q, k, v)) <= 1e-6


def test_profile_of_all_rows_is_the_whole_truth():
    q, k, v = qkv(1, 2, 40, 48, 16)
    plans = [random_plan(1, 2, 40, 48, order=True), random_plan(1, 2, 40, 48, ragged=True)]
    profile = profile_plans(q, k, v, plans, rows=999)
    dense = dense_attention(q, k, v)
    for i, plan in enumerate(plans):
        output, lse = sparse_attention(q, k, v, plan, return_lse=True)
        error = (output - dense).square().mean((1, 3))
        assert rms(profile.error[i], error) <= 1e-5
        full = dense_attention(q, k, v, return_lse=True)[1]
        assert rms(profile.recall[i], (lse - full).exp().mean(-1)) <= 1e-5


def test_a_profile_samples_the_whole_sequence():
    """Four queries; only the last block is served, which recall shows as one in four."""
    q, k, v = qkv(1, 1, 64, 64, 16)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 3] = True
    profile = profile_plans(q, k, v, [SparsePlan.from_mask(mask, 16, 16)], rows=4)
    assert profile.recall.item() == pytest.approx(0.25, abs=1e-6)


X = torch.zeros(1, 40, 2, 8)
LSE = torch.zeros(1, 2, 40)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_pool(X, 24), "power of two of at least 16"),
        (lambda: mean_pool(X[0], 16), "4-D float"),
        (lambda: mean_pool(X, torch.zeros(1, 2, 3)), "int32"),
        (lambda: mean_pool(X, torch.zeros(1, 3, 3).int()), "first sizes must be 1 or"),
        (lambda: mean_pool(X, 16, order=torch.zeros(40).int()), r"\[B\|1, H\|1, S\]|first sizes"),
        (lambda: mean_pool(X.clone().requires_grad_(), 16), "no backward pass"),
        (lambda: centroid_scores(X, X[..., :4]), r"\[B, H, nQ, D\]"),
        (lambda: centroid_scores(X, X, key_sizes=torch.ones(1, 1, 3)), "key_sizes"),
        (lambda: antidiagonal_scores(X, X, stride=3), "stride is 3"),
        (lambda: antidiagonal_scores(X, X, stride=16, block_q=8), "block_q is 8"),
        (lambda: antidiagonal_scores(X, X, scale=-1.0), "above 0"),
        (lambda: block_mass(X, X, LSE, block_k=24), "block_k is 24"),
        (lambda: block_mass(X, X, LSE, row_step=3), "row_step is 3"),
        (lambda: block_mass(X, X, LSE[:, :, :39]), r"must be float32 \(1, 2, 40\)"),
        (lambda: kmeans(X, 41), "from 1 to the 40 tokens"),
        (lambda: kmeans(X, 4, 0), "iterations is 0"),
        (lambda: assign_clusters(X, torch.zeros(1, 2, 3, 9)), r"\[1, 2, C, 8\]"),
        (lambda: profile_plans(X, X, X, []), "0 plans"),
        (lambda: mean_pool(X, 16, backend="fast"), "supported are torch, triton"),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_attention_with_lse_and_lengths(dtype):
    q, k, v = qkv(2, 2, 30, 50, 24, dtype)
    lengths = torch.tensor([41, 0])
    output, lse = dense_attention(q, k, v, return_lse=True, key_lengths=lengths)
    want = weights_of(q[:1], k[:1, :41]) @ v[:1, :41].transpose(1, 2).double()
    assert rms(output[:1], want.transpose(1, 2)) <= {torch.float32: 1e-6}.get(dtype, 1e-2)
    scores = q[:1].transpose(1, 2).double() @ k[:1, :41].permute(0, 2, 3, 1).double() * 24**-0.5
    # Halves: how the products of q and k are summed is the processor's choice.
    assert rms(lse[:1], scores.logsumexp(-1)) <= {torch.float32: 1e-6}.get(dtype, 1e-5)
    assert (output[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert (
        rms(
            dense_attention(q, k, v),
            weights_of(q, k).matmul(v.transpose(1, 2).double()).transpose(1, 2),
        )
        <= 1e-2
    )


def test_dense_attention_refuses():
    with pytest.raises(ValueError, match="at least one token"):
        dense_attention(X, X[:, :0], X[:, :0])
    with pytest.raises(ValueError, match="no backward pass"):
        dense_attention(X.clone().requires_grad_(), X, X)
