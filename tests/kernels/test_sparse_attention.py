"""The torch path of sparse attention against float64, and what must hold for any attention."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.kernels.dense_attention import dense_attention
from blockcache.kernels.sparse_attention import (
    Centroids,
    SparsePlan,
    gather,
    merge_states,
    sparse_attention,
)
from kernel_toys import (
    DTYPES,
    HEAD_DIMS,
    check_attention,
    exact_attention,
    qkv,
    random_extras,
    random_offsets,
    random_orders,
    random_plan,
    rms,
)


def dense(q, k, v, **options):
    """torch's own attention on `[B, S, H, D]`."""
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)
    return out.transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("ragged", "order"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_every_form_against_float64(dtype, head_dim, ragged, order):
    q, k, v = qkv(2, 2, 71, 90, head_dim, dtype)
    plan = random_plan(2, 2, 71, 90, ragged=ragged, order=order)
    check_attention(sparse_attention(q, k, v, plan, return_lse=True), q, k, v, plan)
    output = sparse_attention(q, k, v, plan)
    assert rms(output, exact_attention(q, k, v, plan)[0]) <= {torch.float32: 1e-6}.get(dtype, 1e-2)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3),
    q_length=st.sampled_from([1, 15, 16, 63, 64, 65, 130]),
    k_length=st.sampled_from([1, 16, 63, 65, 200]), head_dim=st.sampled_from([1, 8, 64, 72, 160]),
    sizes=st.sampled_from([(16, 16), (64, 32), (32, 64), (128, 128)]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    ragged=st.booleans(), order=st.booleans(), extras=st.booleans(), lengths=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_combination(
    batch, heads, q_length, k_length, head_dim, sizes, density, ragged, order, extras, lengths, seed
):
    torch.manual_seed(seed)
    q, k, v = qkv(batch, heads, q_length, k_length, head_dim)
    plan = random_plan(
        batch, heads, q_length, k_length, ragged=ragged, order=order, sizes=sizes, density=density
    )
    options = {}
    if extras:
        options["initial"], options["centroids"] = random_extras(plan, q)
    if lengths:
        options["key_lengths"] = torch.randint(0, k_length + 1, (batch,))
    # Larger logits than this, and fp32 itself is off by more than 1e-6.
    scale = 1.3 * head_dim**-0.5
    result = sparse_attention(q, k, v, plan, return_lse=True, scale=scale, **options)
    check_attention(result, q, k, v, plan, scale=scale, **options)


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("how", ["plain", "fused", "expanded", "last stride"])
def test_layouts_and_strides(layout, how):
    batch, heads, length, head_dim = 2, 3, 50, 64
    shape = (
        (batch, length, heads, head_dim) if layout == "BSHD" else (batch, heads, length, head_dim)
    )
    if how == "fused":
        q, k, v = torch.randn(*shape[:3], 3 * head_dim).chunk(3, -1)
    elif how == "expanded":
        q, k, v = (torch.randn(1, *shape[1:]).expand(shape) for _ in range(3))
    elif how == "last stride":
        q, k, v = (torch.randn(*shape[:2], shape[3], shape[2]).transpose(2, 3) for _ in range(3))
    else:
        q, k, v = (torch.randn(shape) for _ in range(3))
    plan = random_plan(batch, heads, length, length)
    output, lse = sparse_attention(q, k, v, plan, layout=layout, return_lse=True)
    if layout == "BHSD":
        q, k, v, output = (t.transpose(1, 2) for t in (q, k, v, output))
    check_attention((output, lse), q, k, v, plan)


def test_everything_chosen_is_dense_attention():
    q, k, v = qkv(1, 2, 100, 77, 64)
    mask = torch.ones(1, 1, 4, 5, dtype=torch.bool)
    plan = SparsePlan.from_mask(mask, 32, 16, random_orders(1, 2, 100), random_orders(1, 2, 77))
    assert rms(sparse_attention(q, k, v, plan), dense(q, k, v)) <= 1e-6


def test_two_halves_of_a_mask_merge_to_the_whole():
    q, k, v = qkv(2, 2, 64, 96, 64)
    whole, half = torch.rand(2, 2, 2, 6) < 0.8, torch.rand(2, 2, 2, 6) < 0.5
    parts = [SparsePlan.from_mask(m, 32, 16) for m in (whole & half, whole & ~half)]
    (o_a, lse_a), (o_b, lse_b) = (sparse_attention(q, k, v, p, return_lse=True) for p in parts)
    plan = SparsePlan.from_mask(whole, 32, 16)
    merged = merge_states(o_a.transpose(1, 2), lse_a, o_b.transpose(1, 2), lse_b)
    check_attention((merged[0].transpose(1, 2), merged[1]), q, k, v, plan)
    chained = sparse_attention(q, k, v, parts[1], initial=(o_a, lse_a), return_lse=True)
    check_attention(chained, q, k, v, plan)


def test_the_ratio_of_two_lses_is_the_mass_chosen():
    q, k, v = qkv(1, 1, 64, 64, 64)
    plan = random_plan(1, 1, 64, 64)
    full = SparsePlan.from_mask(torch.ones_like(plan.mask()), 32, 16)
    chosen, everything = (sparse_attention(q, k, v, p, return_lse=True)[1] for p in (plan, full))
    weights = ((q[0, :, 0] @ k[0, :, 0].T) / 8).softmax(-1)
    columns = plan.mask()[0, 0].repeat_interleave(32, 0).repeat_interleave(16, 1)
    assert torch.allclose((chosen - everything).exp()[0, 0], (weights * columns).sum(-1), atol=1e-6)


def test_an_empty_row_is_nothing_and_merges_as_nothing():
    q, k, v = qkv(1, 1, 32, 32, 64)
    plan = SparsePlan.from_mask(torch.zeros(1, 1, 1, 1, dtype=torch.bool), 32, 32)
    output, lse = sparse_attention(q, k, v, plan, return_lse=True)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()
    assert (sparse_attention(q, k, v, plan) == 0).all()
    earlier = torch.randn_like(q), torch.randn(1, 1, 32)
    output, lse = sparse_attention(q, k, v, plan, initial=earlier, return_lse=True)
    assert torch.equal(output, earlier[0])
    assert torch.equal(lse, earlier[1])


def test_what_is_not_chosen_is_not_read():
    q, k, v = qkv(1, 1, 32, 70, 64)
    mask = torch.tensor([[[[True, False, True, False, True]]]])
    plan = SparsePlan.from_mask(mask, 32, 16)
    want = sparse_attention(q, k, v, plan)
    for block in (1, 3):
        k[:, 16 * block : 16 * block + 16] = torch.nan
        v[:, 16 * block : 16 * block + 16] = torch.inf
    assert torch.equal(sparse_attention(q, k, v, plan), want)
    lengths = torch.tensor([66])
    want = sparse_attention(q, k, v, plan, key_lengths=lengths)
    k[:, 66:], v[:, 66:] = torch.nan, torch.nan
    assert torch.equal(sparse_attention(q, k, v, plan, key_lengths=lengths), want)


def test_centroids_of_equal_keys_are_exact():
    """Where all keys of a block are equal, and all values, its centroid stands for it exactly."""
    q, k, v = qkv(1, 2, 40, 64, 64)
    k, v = (t[:, ::16].repeat_interleave(16, 1) for t in (k, v))
    plan = random_plan(1, 2, 40, 64)
    means = (t[:, ::16].transpose(1, 2).contiguous() for t in (k, v))
    centroids = Centroids(*means, torch.full((1, 1, 4), 16))
    assert rms(sparse_attention(q, k, v, plan, centroids=centroids), dense(q, k, v)) <= 1e-6


def test_a_constant_added_to_all_keys_changes_nothing():
    q, k, v = qkv(1, 2, 64, 64, 64)
    plan = random_plan(1, 2, 64, 64)
    moved = sparse_attention(q, k + torch.randn(64), v, plan)
    assert rms(moved, sparse_attention(q, k, v, plan)) <= 1e-5


def test_choosing_more_never_lowers_the_lse():
    q, k, v = qkv(1, 1, 32, 128, 64)
    before = None
    for count in range(1, 9):
        mask = (torch.arange(8) < count)[None, None, None]
        lse = sparse_attention(q, k, v, SparsePlan.from_mask(mask, 32, 16), return_lse=True)[1]
        assert before is None or (lse >= before - 1e-6).all()
        before = lse


@pytest.mark.parametrize("ragged", [False, True])
def test_heads_on_a_pool_give_the_same_bits(ragged):
    q, k, v = qkv(2, 5, 150, 150, 64)
    plan = random_plan(2, 5, 150, 150, ragged=ragged)
    want = sparse_attention(q, k, v, plan, return_lse=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.inference_mode():
            first, second = (sparse_attention(q, k, v, plan, return_lse=True) for _ in range(2))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for result in (first, second):
        assert torch.equal(result[0], want[0])
        assert torch.equal(result[1], want[1])


def test_an_error_in_the_pool_reaches_the_caller(monkeypatch):
    def broken(*args):
        raise RuntimeError("worker")

    monkeypatch.setattr(gather, "_attend_head", broken)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    q, k, v = qkv(1, 2, 32, 32, 64)
    with pytest.raises(RuntimeError, match="worker"):
        sparse_attention(q, k, v, random_plan(1, 2, 32, 32))


def test_addresses_beyond_two_to_the_31():
    """Rows 2^25 elements apart; the memory between them is reserved and never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    room = torch.empty(2**31 + 2**12, dtype=torch.float16)
    q, k, v = (
        room.as_strided((1, 65, 1, 64), (0, 2**25, 64, 1), 64 * i).normal_() for i in range(3)
    )
    plan = random_plan(1, 1, 65, 65, sizes=(64, 64), density=1.0)
    result = sparse_attention(q, k, v, plan, return_lse=True)
    check_attention(result, *(t.contiguous() for t in (q, k, v)), plan)


@pytest.mark.parametrize("lengths", [None, torch.tensor([50, 0])])
def test_dense_attention_written_out_is_torch_s_own(lengths, monkeypatch):
    """What is done where torch has no attention that returns its LSE."""
    q, k, v = qkv(2, 3, 40, 70, 16)
    own = dense_attention(q, k, v, return_lse=True, key_lengths=lengths)
    monkeypatch.setattr("blockcache.kernels.dense_attention.reference.CPU_FLASH", None)
    written = dense_attention(q, k, v, return_lse=True, key_lengths=lengths)
    assert (own[0] - written[0]).abs().max() < 1e-6
    assert torch.equal(own[1] == -torch.inf, written[1] == -torch.inf)
    finite = written[1] > -torch.inf
    assert finite.any() and (own[1] - written[1])[finite].abs().max() < 1e-5


def test_without_lse_attention_is_written_out_on_request(monkeypatch):
    """Where torch has no attention that returns the LSE the scores are written out."""
    monkeypatch.setattr(gather, "CPU_FLASH", None)
    q, k, v = qkv(1, 2, 70, 70, 64)
    plan = random_plan(1, 2, 70, 70)
    check_attention(sparse_attention(q, k, v, plan, return_lse=True), q, k, v, plan)


Q, K, V = (torch.zeros(2, 64, 3, 64) for _ in range(3))
MEANS = torch.zeros(2, 3, 5, 64)
PLAN = SparsePlan.from_mask(torch.ones(1, 1, 2, 4, dtype=torch.bool), 32, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": Q[0]}, r"query is torch.float32 \(64, 3, 64\).*4-D"),
        ({"key": K.half()}, "key is torch.float16.*must be a 4-D torch.float32"),
        ({"key": K[:, :, :2], "value": V[:, :, :2]}, "must agree in batch, heads"),
        ({"value": V[:, :60]}, "key and value in length too"),
        ({"key": K[..., :32], "value": V[..., :32]}, "head dimension"),
        ({"query": Q.long(), "key": K.long(), "value": V.long()}, "floating-point"),
        ({"layout": "SBHD"}, "supported are BSHD, BHSD"),
        ({"scale": 0.0}, "above 0"),
        ({"scale": float("nan")}, "above 0"),
        ({"query": Q[:, :32]}, "2 q blocks of 32 tokens; a length of 32 needs 1"),
        ({"key": K[:, :32], "value": V[:, :32]}, "4 k blocks of 16 tokens; a length of 32 needs 2"),
        ({"key": K[:, :0], "value": V[:, :0]}, "a length of 0 needs 0"),
        ({"initial": (Q, torch.zeros(2, 64, 3))}, r"initial is .*must be .*float32 \(2, 3, 64\)"),
        ({"key_lengths": torch.tensor([3])}, r"key_lengths is .*\[2\]"),
        ({"key_lengths": torch.tensor([3.0, 4.0])}, "int32 or int64"),
        ({"backend": "flash"}, "supported are torch, triton"),
        ({"backend": "triton"}, "needs CUDA tensors"),
        ({"query": Q.clone().requires_grad_()}, "no backward pass"),
        ({"centroids": Centroids(MEANS, MEANS, torch.ones(1, 1, 5))},
         "centroids.key is"),
        ({"centroids": Centroids(MEANS[:, :, :4], MEANS[:, :, :4], torch.ones(1, 1, 5))},
         "centroids.counts is"),
        ({"plan": SparsePlan.from_mask(torch.ones(1, 2, 2, 4, dtype=torch.bool), 32, 16)},
         r"first two sizes must be 1 or .*\(2, 3\)"),
        ({"plan": SparsePlan(PLAN.bits.to("meta"), 4, 32, 16)}, "plan is on meta, query on cpu"),
        ({"plan": SparsePlan(PLAN.bits, 4, 32, 16, torch.zeros(1, 1, 63).int())}, "lists 63"),
    ],
)  # fmt: skip
def test_bad_input_says_what_is_wrong(change, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given = {"query": Q, "key": K, "value": V, "plan": PLAN} | change
    with pytest.raises(ValueError, match=message):
        sparse_attention(**given)


def test_a_gradient_is_fine_where_none_is_kept():
    q, k, v = (t.clone().requires_grad_() for t in (Q, K, V))
    with torch.no_grad():
        assert not sparse_attention(q, k, v, PLAN).requires_grad


def test_zero_length_blocks_at_both_ends():
    offsets = torch.tensor([[[0, 0, 20, 20, 50, 50]]], dtype=torch.int32)
    q, k, v = qkv(1, 2, 50, 50, 64)
    plan = SparsePlan.from_mask(torch.ones(1, 2, 5, 5, dtype=torch.bool), offsets, offsets)
    assert rms(sparse_attention(q, k, v, plan), dense(q, k, v)) <= 1e-6
    assert plan.density(50, 50).tolist() == [[1.0, 1.0]]
    assert random_offsets(1, 1, 3, 9)[0, 0, -1] == 3
