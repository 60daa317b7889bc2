"""The attention kernel, on a GPU or in the interpreter; small, for a tile takes 4 ms there."""

import pytest
import torch

from blockcache.kernels.dense_attention import dense_attention
from blockcache.kernels.sparse_attention import SparsePlan, sparse_attention
from blockcache.kernels.sparse_attention.kernel import key_table
from blockcache.kernels.sparse_attention.tiles import KeyTiles
from kernel_toys import (
    DTYPES,
    HEAD_DIMS,
    check_attention,
    qkv,
    random_extras,
    random_offsets,
    random_plan,
    rms,
)

FORMS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("ragged", "order"), FORMS)
def test_every_form_against_float64(head_dim, ragged, order, device):
    q, k, v = qkv(1, 2, 50, 70, head_dim, device=device)
    plan = random_plan(1, 2, 50, 70, ragged=ragged, order=order, device=device)
    result = sparse_attention(q, k, v, plan, return_lse=True, backend="triton")
    check_attention(result, q, k, v, plan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ragged", "order"), FORMS)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_everything_at_once(dtype, ragged, order, head_dim, device):
    q, k, v = qkv(2, 2, 40, 70, head_dim, dtype, device)
    plan = random_plan(2, 2, 40, 70, ragged=ragged, order=order, device=device)
    initial, centroids = random_extras(plan, q)
    lengths = torch.tensor([60, 0], device=device)
    options = {"initial": initial, "centroids": centroids, "key_lengths": lengths, "scale": 0.3}
    result = sparse_attention(q, k, v, plan, return_lse=True, backend="triton", **options)
    check_attention(result, q, k, v, plan, **options)


@pytest.mark.parametrize(("q_length", "k_length"), [(1, 1), (64, 64), (65, 63), (1, 130), (130, 1)])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (16, 16)])
def test_tails_and_single_tokens(q_length, k_length, sizes, device):
    q, k, v = qkv(1, 1, q_length, k_length, 64, torch.float16, device)
    plan = random_plan(1, 1, q_length, k_length, sizes=sizes, density=0.7, device=device)
    result = sparse_attention(q, k, v, plan, return_lse=True, backend="triton")
    check_attention(result, q, k, v, plan)


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("how", ["fused", "expanded", "last stride"])
def test_layouts_and_strides(layout, how, device):
    shape = (2, 40, 3, 64) if layout == "BSHD" else (2, 3, 40, 64)
    if how == "fused":
        q, k, v = torch.randn(*shape[:3], 192, device=device).chunk(3, -1)
    elif how == "expanded":
        q, k, v = (torch.randn(1, *shape[1:], device=device).expand(shape) for _ in range(3))
    else:
        q, k, v = (
            torch.randn(*shape[:2], shape[3], shape[2], device=device).transpose(2, 3)
            for _ in range(3)
        )
    plan = random_plan(2, 3, 40, 40, device=device)
    output, lse = sparse_attention(q, k, v, plan, layout=layout, return_lse=True, backend="triton")
    if layout == "BHSD":
        q, k, v, output = (t.transpose(1, 2) for t in (q, k, v, output))
    check_attention((output, lse), q, k, v, plan)


def test_what_is_not_chosen_is_not_read(device):
    q, k, v = qkv(1, 1, 32, 70, 64, device=device)
    mask = torch.tensor([[[[True, False, True, False, True]]]], device=device)
    plan = SparsePlan.from_mask(mask, 32, 16)
    want = sparse_attention(q, k, v, plan, backend="triton")
    for block in (1, 3):
        k[:, 16 * block : 16 * block + 16] = torch.nan
        v[:, 16 * block : 16 * block + 16] = torch.inf
    assert torch.equal(sparse_attention(q, k, v, plan, backend="triton"), want)
    lengths = torch.tensor([66], device=device)
    want = sparse_attention(q, k, v, plan, key_lengths=lengths, backend="triton")
    k[:, 66:], v[:, 66:] = torch.nan, torch.nan
    assert torch.equal(sparse_attention(q, k, v, plan, key_lengths=lengths, backend="triton"), want)


def test_addresses_beyond_two_to_the_31(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    room = torch.empty(2**31 + 2**12, dtype=torch.float16, device=device)
    q, k, v = (
        room.as_strided((1, 65, 1, 64), (0, 2**25, 64, 1), 64 * i).normal_() for i in range(3)
    )
    plan = random_plan(1, 1, 65, 65, sizes=(64, 64), density=1.0, device=device)
    result = sparse_attention(q, k, v, plan, return_lse=True, backend="triton")
    check_attention(result, *(t.contiguous() for t in (q, k, v)), plan)


def test_repeats_are_equal_bit_for_bit(device):
    q, k, v = qkv(1, 2, 50, 70, 64, torch.float16, device)
    plan = random_plan(1, 2, 50, 70, ragged=True, order=True, device=device)
    first, second = (sparse_attention(q, k, v, plan, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [None, [60, 0]])
def test_dense(dtype, lengths, device):
    q, k, v = qkv(2, 2, 30, 70, 72, dtype, device)
    lengths = None if lengths is None else torch.tensor(lengths, device=device)
    result = dense_attention(q, k, v, return_lse=True, key_lengths=lengths, backend="triton")
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    plan = SparsePlan.from_mask(everything, 32, 128)
    check_attention(result, q, k, v, plan, key_lengths=lengths)
    assert rms(dense_attention(q, k, v, backend="triton"), dense_attention(q, k, v)) <= 1e-2


@pytest.mark.parametrize(
    ("columns", "ragged"), [(1, False), (300, False), (1100, False), (40, True)]
)
def test_the_table_lists_what_the_mask_says(columns, ragged, device):
    mask = torch.rand(1, 2, 2, columns) < 0.4
    mask[0, 1, 0] = False
    blocks = random_offsets(2, 1, 200, columns, device) if ragged else 16
    plan = SparsePlan.from_mask(mask.to(device), 16, blocks)
    tiles = KeyTiles.of(plan, 200 if ragged else 16 * columns).cut(16)
    table, counts = key_table(plan, tiles)
    for b in range(2 if ragged else 1):
        for h in range(2):
            numbers = torch.arange(columns)
            if ragged:
                real = tiles.start[b, 0] < tiles.end[b, 0]
                numbers = tiles.block[b, 0].long().cpu()
            for row in range(2):
                used = mask[0, h, row][numbers]
                used = used & real.cpu() if ragged else used
                want = used.nonzero().flatten().tolist()
                assert table[b, h, row, : counts[b, h, row]].tolist() == want
                assert 0 <= table[b, h, row, 0] < len(numbers)


def test_a_head_dimension_that_is_too_large(device):
    q, k, v = qkv(1, 1, 16, 16, 160, device=device)
    with pytest.raises(ValueError, match="head dimension 160 is above 128"):
        sparse_attention(q, k, v, random_plan(1, 1, 16, 16, device=device), backend="triton")
