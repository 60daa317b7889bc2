"""Plans, bits and tables."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.kernels.sparse_attention import SparsePlan, merge_states, pack_bits, unpack_bits
from blockcache.kernels.sparse_attention.reference import token_mask
from blockcache.kernels.sparse_attention.tiles import cut_ragged
from kernel_toys import random_offsets, random_plan


@settings(max_examples=50, deadline=None)
@given(columns=st.integers(1, 100), seed=st.integers(0, 999))
def test_bits_say_what_the_mask_says(columns, seed):
    torch.manual_seed(seed)
    mask = torch.rand(2, 3, 4, columns) < 0.4
    bits = pack_bits(mask)
    assert bits.dtype == torch.int32
    assert bits.shape == (2, 3, 4, (columns + 31) // 32)
    assert torch.equal(unpack_bits(bits, columns), mask)


def test_a_bit_is_where_the_plan_says():
    mask = torch.zeros(1, 1, 1, 70, dtype=torch.bool)
    mask[..., [0, 31, 33]] = True
    assert pack_bits(mask)[0, 0, 0].tolist() == [1 - 2**31, 2, 0]


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 200), blocks=st.integers(1, 12), size=st.sampled_from([16, 64]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_ragged_tiles_cover_every_row_once(length, blocks, size, seed):
    torch.manual_seed(seed)
    offsets = random_offsets(1, 2, length, blocks)
    block, start, end = cut_ragged(offsets, size, length)
    for h in range(2):
        rows = [range(a, b) for a, b in zip(start[0, h].tolist(), end[0, h].tolist(), strict=True)]
        assert sorted(row for tile in rows for row in tile) == list(range(length))
        for tile, number in zip(rows, block[0, h].tolist(), strict=True):
            assert len(tile) <= size
            assert (
                not tile
                or offsets[0, h, number] <= tile[0] < tile[-1] + 1 <= offsets[0, h, number + 1]
            )


@pytest.mark.parametrize("ragged", [False, True])
def test_density_counts_token_pairs(ragged):
    plan = random_plan(2, 3, 71, 90, ragged=ragged)
    want = token_mask(plan, 2, 3, 71, 90).float().mean((2, 3))
    assert torch.allclose(plan.density(71, 90).expand(2, 3), want, atol=1e-6)


def test_merging_with_nothing_gives_the_same():
    o, lse = torch.randn(2, 5, 8), torch.randn(2, 5)
    nothing = torch.full_like(o, torch.nan), torch.full_like(lse, -torch.inf)
    for merged in (merge_states(o, lse, *nothing), merge_states(*nothing, o, lse)):
        assert torch.equal(merged[0], o)
        assert torch.equal(merged[1], lse)
    both = merge_states(*nothing, *nothing)
    assert (both[0] == 0).all()
    assert (both[1] == -torch.inf).all()


BITS = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
OFFSETS = torch.tensor([[[0, 3, 5]]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": BITS.long()}, "from_mask packs a bool mask"),
        ({"bits": BITS[0]}, r"\[B\|1, H\|1, nQ, 1\]"),
        ({"num_k_blocks": 40}, r"for 40 key blocks it must be int32 \[B\|1, H\|1, nQ, 2\]"),
        ({"num_k_blocks": 0}, "at least one"),
        ({"q_blocks": 48}, "q_blocks is 48; .*power of two"),
        ({"k_blocks": 8}, "k_blocks is 8; .*at least 16"),
        ({"k_blocks": 0}, "power of two"),
        ({"q_blocks": OFFSETS.long()}, "must be int32"),
        ({"k_blocks": OFFSETS}, r"offsets of 4 blocks must be int32 \[B\|1, H\|1, 5\]"),
        ({"q_blocks": OFFSETS.to("meta")}, "q_blocks is on meta, bits are on cpu"),
        ({"q_order": torch.arange(5)}, r"q_order is .*\[B\|1, H\|1, S\]"),
        ({"k_order": torch.zeros(1, 1, 5)}, "int32 or int64"),
        ({"k_order": torch.zeros(1, 1, 5, device="meta").int()}, "k_order is on meta"),
    ],
)
def test_tables_that_do_not_fit(fields, message):
    given = {"bits": BITS, "num_k_blocks": 4, "q_blocks": 32, "k_blocks": 16} | fields
    with pytest.raises(ValueError, match=message):
        SparsePlan(**given)


def test_from_mask_wants_a_bool_mask():
    with pytest.raises(ValueError, match="needs bool"):
        SparsePlan.from_mask(torch.ones(1, 1, 2, 2), 32, 32)
