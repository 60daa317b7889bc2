"""torch's flex_attention as a backend that is chosen by name."""

import pytest
import torch

from blockcache.kernels.sparse_attention import (
    Centroids,
    SparsePlan,
    is_supported,
    sparse_attention,
)

SHAPE = (1, 2, 200, 16)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def plan(ordered=False, **changes):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(1, 2, 7, 4, generator=generator) < 0.5
    mask[..., 0] = True
    order = torch.randperm(200, generator=generator)[None, None] if ordered else None
    settings = dict(mask=mask, q_blocks=32, k_blocks=64, q_order=order, k_order=order)
    return SparsePlan.from_mask(**(settings | changes))


@pytest.mark.slow
def test_flex_attends_to_the_same_blocks():
    """Compiles for about 20 seconds; the tail blocks are short, and tokens permuted."""
    q, k, v = tensors()
    for ordered in (False, True):
        chosen = plan(ordered)
        assert is_supported("flex", q, chosen) == (True, "")
        with torch.no_grad():
            flex = sparse_attention(q, k, v, chosen, layout="BHSD", scale=0.3, backend="flex")
            own = sparse_attention(q, k, v, chosen, layout="BHSD", scale=0.3, backend="torch")
        assert (flex - own).abs().max() < 5e-6


CENTROIDS = Centroids(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), torch.ones(1, 1, 4))
OFFSETS = torch.arange(0, 201, 50, dtype=torch.int32)[None, None]


@pytest.mark.parametrize(
    ("chosen", "extras", "reason"),
    [
        (plan(), dict(return_lse=True), "has no return_lse"),
        (plan(), dict(centroids=CENTROIDS), "has no centroids"),
        (plan(), dict(key_lengths=torch.tensor([90])), "has no key_lengths"),
        (plan(), dict(initial=(torch.zeros(SHAPE), torch.zeros(SHAPE[:3]))), "has no initial"),
        (plan(k_blocks=OFFSETS), {}, "blocks of one size"),
    ],
)
def test_what_flex_cannot_do_is_refused_with_the_reason(chosen, extras, reason):
    q, k, v = tensors()
    is_fine, why = is_supported("flex", q, chosen, **extras)
    assert not is_fine and reason in why
    with pytest.raises(ValueError, match=f"backend='flex' was asked for: .*{reason}"):
        sparse_attention(q, k, v, chosen, layout="BHSD", backend="flex", **extras)


def test_flex_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "C++ compiler" in is_supported("flex", tensors()[0], plan())[1]


def test_our_own_backends_answer_too():
    q = tensors()[0]
    assert is_supported("torch", q, plan()) == (True, "")
    assert "supported are torch, triton" in is_supported("cutlass", q, plan())[1]
