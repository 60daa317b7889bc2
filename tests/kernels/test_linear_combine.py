import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.kernels.linear_combine import linear_combine, relative_change
from kernel_toys import DTYPES, rms

WEIGHTS = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6)


def exact(tensors, weights, base=None):
    total = sum(w * t.double() for t, w in zip(tensors, weights, strict=True))
    return total if base is None else total + base.double()


def laid_out(shape, layout, dtype):
    """The same shape with other strides."""
    if layout == "transposed":
        return torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    if layout == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    if layout == "expanded":
        return torch.randn(shape[:-1] + (1,)).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
    layouts=st.lists(
        st.sampled_from(["plain", "transposed", "strided", "expanded"]), min_size=7, max_size=7
    ),
    weights=WEIGHTS,
    dtype=st.sampled_from(DTYPES),
    with_base=st.booleans(),
)
def test_any_shape_and_strides(shape, layouts, weights, dtype, with_base):
    tensors = [laid_out(shape, how, dtype) for how, _ in zip(layouts, weights, strict=False)]
    base = laid_out(shape, layouts[-1], dtype) if with_base else None
    before = [t.clone() for t in tensors]
    result = linear_combine(tensors, weights, base)
    want = exact(tensors, weights, base)
    assert result.dtype == dtype
    assert result.shape == want.shape
    # Terms may cancel, so the error is measured against their size.
    size = exact(
        [t.abs() for t in tensors], [abs(w) for w in weights], None if base is None else base.abs()
    )
    allowed = size * 1e-6 + want.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    assert ((result.double() - want).abs() <= allowed).all()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("weights", [[1.0], [0.0], [2.0], [1.0, 0.0]])
@pytest.mark.parametrize("with_base", [False, True])
def test_the_result_is_never_an_input(weights, with_base):
    tensors = [torch.ones(3) for _ in weights]
    base = torch.ones(3) if with_base else None
    result = linear_combine(tensors, weights, base)
    result.fill_(7)
    assert all((t == 1).all() for t in tensors)
    assert base is None or (base == 1).all()


def test_a_weight_of_zero_does_not_read():
    nan = torch.full((3,), torch.nan)
    assert torch.equal(linear_combine([nan, torch.ones(3)], [0.0, 2.0]), torch.full((3,), 2.0))
    assert torch.equal(linear_combine([nan], [0.0]), torch.zeros(3))
    assert torch.equal(linear_combine([nan], [0.0], base=torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_an_input(dtype):
    tensors = [torch.randn(5, 6).to(dtype) for _ in range(3)]
    weights = [0.5, -1.5, 2.0]
    want = linear_combine(tensors, weights)
    result = linear_combine(tensors, weights, out=tensors[1])
    assert result is tensors[1]
    assert torch.equal(result, want)


def test_sixteen_bits_are_rounded_once():
    """Sums kept in bf16 would lose the small terms: 256 + 1 - 256 is 0 there."""
    terms = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 256.0)]
    assert linear_combine(terms, [1.0, 1.0, -1.0]).item() == 1.0


def test_base_decides_the_dtype():
    result = linear_combine([torch.ones(2, dtype=torch.bfloat16)], [0.1], base=torch.ones(2))
    assert result.dtype == torch.float32
    assert rms(result, torch.full((2,), 1.1)) < 1e-7


def test_gradients_flow_through_the_torch_path():
    x = torch.randn(4, requires_grad=True)
    linear_combine([x, x], [2.0, 3.0], base=x).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 6.0))


@pytest.mark.parametrize(
    ("tensors", "weights", "options", "message"),
    [
        ([], [], {}, "at least one tensor"),
        ([torch.ones(2)], [1.0, 2.0], {}, "1 tensors and 2 weights"),
        ([torch.ones(2), torch.ones(3)], [1.0, 2.0], {}, r"\(3,\).*\(2,\).*nothing is broadcast"),
        ([torch.ones(2)], [1.0], {"base": torch.ones(1)}, "nothing is broadcast"),
        ([torch.ones(2)], [1.0], {"out": torch.ones(2, device="meta")}, "meta"),
        ([torch.ones(2)], [1.0], {"backend": "cuda"}, "supported are torch, triton"),
        ([torch.ones(2)], [1.0], {"backend": "triton"}, "needs CUDA tensors"),
    ],
)
def test_bad_input_says_what_is_wrong(tensors, weights, options, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        linear_combine(tensors, weights, **options)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    most=st.none() | st.integers(1, 50),
)
def test_relative_change(shape, dtype, most):
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    result = relative_change(a, b, most)
    assert result.shape == (2,)
    assert result.dtype == torch.float32
    if most is None or most >= a.numel():
        want = torch.stack(((a.double() - b.double()).abs().sum(), b.double().abs().sum()))
        assert rms(result, want) <= 1e-6


def test_relative_change_by_hand():
    a, b = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([2.0, -1.0, 0.0])
    assert relative_change(a, b).tolist() == [6.0, 3.0]
    assert relative_change(a, b, 2).tolist() == [5.0, 2.0]


def test_a_subsample_meets_every_channel():
    """A stride of 64 over 128 channels would look at two of them for ever."""
    a = torch.zeros(1000, 128)
    for channel in (0, 1, 64, 127):
        b = a.clone()
        b[:, channel] = 1.0
        seen = relative_change(a, b, 2000)[1].item()
        assert 5 <= seen <= 30, f"channel {channel} was seen {seen} times in about 2000 of 128000"


def test_a_subsample_reads_no_more_than_asked():
    b = torch.ones(12345)
    assert relative_change(b, b, 100)[1].item() <= 100


@pytest.mark.parametrize(
    ("a", "b", "most", "message"),
    [
        (torch.ones(2), torch.ones(3), None, "both must agree"),
        (torch.ones(2), torch.ones(2, device="meta"), None, "both must agree"),
        (torch.ones(2), torch.ones(2), 0, "at least 1"),
    ],
)
def test_relative_change_refuses(a, b, most, message):
    with pytest.raises(ValueError, match=message):
        relative_change(a, b, most)
