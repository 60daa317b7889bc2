"""FlashInfer and SpargeAttn, which need a GPU: what they would be given, by modules that check it.

The fakes keep to the signatures and the documented shapes of the real functions and compute what
these say they compute, in plain loops over heads and blocks.
"""

import inspect
import math
import sys
import types

import pytest
import torch

from blockcache.kernels.sparse_attention import (
    Centroids,
    SparsePlan,
    is_supported,
    sparse_attention,
)
from blockcache.kernels.sparse_attention import flashinfer as flashinfer_backend
from blockcache.kernels.sparse_attention import sparge as sparge_backend
from blockcache.kernels.sparse_attention.on_request import ON_REQUEST
from blockcache.kernels.sparse_attention.reference import sparse_attention_reference

SHAPE = (2, 2, 300, 64)


def tensors(shape=SHAPE, dtype=torch.float16):
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=noise).to(dtype) for _ in range(3)]


def plan(q_blocks=128, k_blocks=64, ordered=False, length=300):
    noise = torch.Generator().manual_seed(1)
    counts = []
    for blocks in (q_blocks, k_blocks):
        is_int = isinstance(blocks, int)
        counts.append(-(-length // blocks) if is_int else blocks.shape[2] - 1)
    mask = torch.rand(2, 2, *counts, generator=noise) < 0.5
    # One row of blocks attends nothing.
    mask[0, 0, 1] = False
    order = torch.randperm(length, generator=noise)[None, None] if ordered else None
    return SparsePlan.from_mask(mask, q_blocks, k_blocks, order, order)


OFFSETS = torch.tensor([0, 40, 40, 170, 300], dtype=torch.int32)[None, None]


class FakeFlashInfer:
    """`flashinfer.VariableBlockSparseAttentionWrapper`, with the arguments that are used here."""

    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8 and backend == "auto"

    def plan(
        self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim,
        causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None,
        sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True,
        q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        heads, rows, columns = block_mask_map.shape
        assert block_mask_map.dtype == torch.bool and block_mask_map.is_contiguous()
        assert block_row_sz.shape == (heads, rows) and block_col_sz.shape == (heads, columns)
        assert block_row_sz.dtype == block_col_sz.dtype == torch.int32
        assert num_qo_heads == num_kv_heads == heads and not causal
        self.made = block_mask_map, block_row_sz, block_col_sz, head_dim, sm_scale, q_data_type

    def run(self, q, k, v, out=None, lse=None, return_lse=False, enable_pdl=None):
        mask, rows, columns, head_dim, scale, dtype = self.made
        heads, length, _ = q.shape
        assert q.dtype == k.dtype == v.dtype == dtype and q.shape[2] == head_dim
        assert k.shape == v.shape and k.shape[0] == heads
        # NaN where nothing is attended: nobody may rely on what stands there.
        output, lse2 = torch.full_like(q, math.nan), q.new_full(q.shape[:2], math.nan).float()
        for h in range(heads):
            assert rows[h].sum() == length and columns[h].sum() == k.shape[1]
            chosen = mask[h].repeat_interleave(rows[h], 0).repeat_interleave(columns[h], 1)
            logits = (q[h].double() @ k[h].double().T * scale).masked_fill(~chosen, -torch.inf)
            some = chosen.any(1)
            output[h][some] = (logits.softmax(-1) @ v[h].double()).to(q.dtype)[some]
            lse2[h][some] = (logits.logsumexp(-1) / math.log(2)).float()[some]
        return (output, lse2) if return_lse else output


def fake_sparge(rows, columns):
    """`spas_sage_attn.block_sparse_sage2_attn_cuda` on a GPU with such blocks."""

    def block_sparse_sage2_attn_cuda(
        q, k, v, mask_id=None, dropout_p=0.0, scale=None, smooth_k=True, pvthreshd=50,
        attention_sink=False, tensor_layout="HND", output_dtype=torch.float16,
        return_sparsity=False,
    ):  # fmt: skip
        assert tensor_layout == "HND" and q.size(-2) >= 128 and q.size(-1) in (64, 128)
        batch, heads, length, _ = q.shape
        count = -(-length // rows), -(-k.shape[2] // columns)
        assert mask_id.shape == (batch, heads, *count)
        assert mask_id.is_contiguous() and mask_id.dtype == torch.int8
        chosen = mask_id.bool().repeat_interleave(rows, 2).repeat_interleave(columns, 3)
        chosen = chosen[:, :, :length, : k.shape[2]]
        logits = (q.double() @ k.double().mT * scale).masked_fill(~chosen, -torch.inf)
        return (logits.softmax(-1) @ v.double()).to(q.dtype)

    return block_sparse_sage2_attn_cuda


@pytest.fixture
def installed(monkeypatch):
    """Both packages as fakes, and no look at the device."""
    flashinfer, sparge = types.ModuleType("flashinfer"), types.ModuleType("spas_sage_attn")
    flashinfer.VariableBlockSparseAttentionWrapper = FakeFlashInfer
    sparge.block_sparse_sage2_attn_cuda = fake_sparge(64, 128)
    for module in (flashinfer, sparge):
        module.__spec__ = types.SimpleNamespace(name=module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("flashinfer", "sparge"):
        accepting = ON_REQUEST[name]._replace(objection=lambda query, plan: "")
        monkeypatch.setitem(ON_REQUEST, name, accepting)
    monkeypatch.setattr(flashinfer_backend, "WORKSPACE_BYTES", 16)
    flashinfer_backend._wrapper.cache_clear()
    yield sparge
    flashinfer_backend._wrapper.cache_clear()


def expected(q, k, v, chosen, initial=None):
    return sparse_attention_reference(q, k, v, chosen, 0.3, initial=initial)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("blocks", [(128, 64), (16, 32), (OFFSETS, OFFSETS), (64, OFFSETS)])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_flashinfer_is_given_our_plan(installed, blocks, ordered, layout):
    q, k, v = tensors()
    chosen = plan(*blocks, ordered=ordered)
    wanted, wanted_lse = expected(q, k, v, chosen)
    given = (t.transpose(1, 2).contiguous() if layout == "BSHD" else t for t in (q, k, v))
    output, lse = sparse_attention(
        *given, chosen, layout=layout, scale=0.3, return_lse=True, backend="flashinfer"
    )
    output = output.transpose(1, 2) if layout == "BSHD" else output
    assert output.dtype == torch.float16 and (output - wanted).abs().max() < 2e-3
    assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
    finite = wanted_lse > -torch.inf
    assert (lse - wanted_lse)[finite].abs().max() < 1e-5


def test_flashinfer_merges_an_earlier_result(installed):
    q, k, v = tensors()
    chosen = plan()
    initial = expected(q, k, v, plan(32, 32))
    initial = initial[0].half(), initial[1].float()
    wanted, _ = expected(q, k, v, chosen, initial)
    found = sparse_attention(
        q, k, v, chosen, layout="BHSD", scale=0.3, initial=initial, backend="flashinfer"
    )
    assert (found - wanted).abs().max() < 2e-3


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("own", "blocks"),
    [((64, 128), (64, 128)), ((64, 128), (128, 256)), ((128, 64), (128, 64)),
     ((128, 64), (256, 64))],
)  # fmt: skip
def test_sparge_is_given_our_plan_in_its_blocks(installed, monkeypatch, own, blocks, ordered):
    installed.block_sparse_sage2_attn_cuda = fake_sparge(*own)
    monkeypatch.setattr(sparge_backend, "capability", lambda query: 90 if own[0] == 64 else 80)
    q, k, v = tensors(dtype=torch.bfloat16)
    chosen = plan(*blocks, ordered=ordered)
    wanted, _ = expected(q, k, v, chosen)
    found = sparse_attention(q, k, v, chosen, layout="BHSD", scale=0.3, backend="sparge")
    assert found.dtype == torch.bfloat16 and (found - wanted).abs().max() < 2e-2


class OnGpu:
    """As much of a CUDA tensor as an objection looks at."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, shape=SHAPE, dtype=torch.float16):
        self.shape, self.dtype = shape, dtype


@pytest.mark.parametrize("name", ["flashinfer", "sparge"])
def test_what_is_not_there_is_refused_with_the_reason(name, monkeypatch):
    package = {"flashinfer": "flashinfer", "sparge": "spas_sage_attn"}[name]
    q, k, v = tensors()
    monkeypatch.setattr("importlib.util.find_spec", lambda found: None)
    is_fine, why = is_supported(name, q, plan(), layout="BHSD")
    assert not is_fine and "not installed" in why
    with pytest.raises(ValueError, match=f"backend='{name}' was asked for: it is not installed"):
        sparse_attention(q, k, v, plan(), layout="BHSD", backend=name)
    asked = []
    monkeypatch.setattr("importlib.util.find_spec", lambda found: asked.append(found) or True)
    assert "the tensors are on cpu" in is_supported(name, q, plan(), layout="BHSD")[1]
    assert asked == [package]


CENTROIDS = Centroids(torch.zeros(1, 2, 5, 64), torch.zeros(1, 2, 5, 64), torch.ones(1, 1, 5))


@pytest.mark.parametrize(
    ("name", "extras", "reason"),
    [
        ("flashinfer", dict(centroids=CENTROIDS), "has no centroids"),
        ("flashinfer", dict(key_lengths=torch.tensor([90, 90])), "has no key_lengths"),
        ("sparge", dict(return_lse=True), "has no return_lse"),
        ("sparge", dict(initial=(torch.zeros(1), torch.zeros(1))), "has no initial"),
        ("sparge", dict(centroids=CENTROIDS), "has no centroids"),
    ],
)
def test_options_that_they_lack_are_refused(name, extras, reason):
    assert is_supported(name, tensors()[0], plan(), layout="BHSD", **extras) == (
        False, f"it {reason}"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tensor", "chosen", "reason"),
    [
        ("flashinfer", OnGpu(), plan(), ""),
        ("flashinfer", OnGpu(), plan(OFFSETS, OFFSETS), ""),
        ("flashinfer", OnGpu(dtype=torch.float32), plan(), "takes float16 and bfloat16"),
        ("flashinfer", OnGpu((1, 2, 300, 80)), plan(), "heads of 64, 128, 256, not 80"),
        ("sparge", OnGpu(), plan(64, 128), ""),
        ("sparge", OnGpu(), plan(128, 128), ""),
        ("sparge", OnGpu(), plan(64, 64), "64 queries by 128 keys, the plan's 64 by 64"),
        ("sparge", OnGpu(), plan(64, OFFSETS), "the plan's 64 by offsets"),
        ("sparge", OnGpu(dtype=torch.float32), plan(64, 128), "takes float16 and bfloat16"),
        ("sparge", OnGpu((1, 2, 300, 96)), plan(64, 128), "heads of 64, 128, not 96"),
        ("sparge", OnGpu((1, 2, 100, 64)), plan(64, 128, length=100), "128 tokens and more"),
    ],
)
def test_objections_on_a_gpu(name, tensor, chosen, reason, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda found: True)
    monkeypatch.setattr(sparge_backend, "capability", lambda query: 90)
    why = ON_REQUEST[name].objection(tensor, chosen)
    assert reason in why if reason else why == ""


def test_every_backend_on_request_takes_the_options_it_claims():
    for backend in ON_REQUEST.values():
        parameters = inspect.signature(backend.attend).parameters
        keywords = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert tuple(keywords) == backend.extras
