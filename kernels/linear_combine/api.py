"""`linear_combine` and `relative_change`: checks, and the choice of backend."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..common import needs_grad, pick_backend
from . import reference

# The fused kernel has this many input pointers; longer histories take the torch path.
MAX_FUSED = 4


def linear_combine(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return `base + sum_j weights[j] * tensors[j]` in a tensor of its own.

    Every predictor (copy, Taylor, Hermite, fitted, ...) is this sum with other weights. It is
    accumulated in fp32 (fp64 for fp64 tensors) and rounded once. A tensor whose weight is exactly 0
    is not read. The torch backend can be differentiated; where a gradient is needed it is the one
    that is chosen.

    Args:
        tensors: At least one tensor, all of one shape, dtype and device, any strides.
        weights: One Python float per tensor.
        base: Added with weight 1; same shape and device. Gives the dtype of the result, else
            `tensors[0]` does.
        out: Written and returned instead of a new tensor. It may be one of the inputs.
        backend: "torch", "triton" or None for the best that can run here.

    Raises:
        ValueError: No tensors, counts or shapes or devices that differ, or a backend that cannot
            run.
    """
    first = tensors[0] if len(tensors) else None
    if first is None or len(tensors) != len(weights):
        raise ValueError(
            f"linear_combine got {len(tensors)} tensors and {len(weights)} weights; "
            "it needs one weight per tensor and at least one tensor."
        )
    for other in (*tensors[1:], base, out):
        if other is not None and (other.shape != first.shape or other.device != first.device):
            raise ValueError(
                f"linear_combine got {tuple(other.shape)} on {other.device} beside "
                f"{tuple(first.shape)} on {first.device}; all must agree, nothing is broadcast."
            )
    if first.is_cuda or backend is not None:
        fused = _can_fuse(tensors, base, out)
        if pick_backend(backend, first) == "triton" and (fused or backend is not None):
            if not fused:
                raise ValueError(
                    "backend='triton' needs 1 to 4 contiguous floating-point tensors of one dtype, "
                    "a contiguous out, and no gradient; use backend='torch' or None."
                )
            from .kernel import linear_combine_triton

            return linear_combine_triton(tensors, weights, base, out)
    return reference.linear_combine_torch(tensors, weights, base, out)


def relative_change(
    a: Tensor,
    b: Tensor,
    max_elements: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return `(sum |a - b|, sum |b|)` as a two-element fp32 tensor on the tensors' device.

    Their quotient is the relative L1 change. Sums, not the quotient, so that ranks can add theirs
    before anyone divides. Nothing is read back to the host.

    Args:
        a: The new tensor, any shape and strides.
        b: The old tensor, same shape and device.
        max_elements: Look only at about this many elements, evenly strided over the flattened
            tensor. The stride shares no factor with the last dimension, so that all channels are
            met. None looks at all.
        backend: "torch", "triton" or None for the best that can run here.

    Raises:
        ValueError: Shapes or devices differ, `max_elements` below 1, or a backend that cannot run.
    """
    if a.shape != b.shape or a.device != b.device:
        raise ValueError(
            f"relative_change got {tuple(a.shape)} on {a.device} and {tuple(b.shape)} on "
            f"{b.device}; both must agree."
        )
    step = _stride(a, max_elements)
    if a.is_cuda or backend is not None:
        fused = a.is_contiguous() and b.is_contiguous() and not needs_grad(a, b)
        if pick_backend(backend, a) == "triton" and (fused or backend is not None):
            if not fused:
                raise ValueError(
                    "backend='triton' needs contiguous tensors and no gradient; "
                    "use backend='torch' or None."
                )
            from .kernel import relative_change_triton

            return relative_change_triton(a, b, step)
    return reference.relative_change_torch(a, b, step)


def _can_fuse(tensors: Sequence[Tensor], base: Tensor | None, out: Tensor | None) -> bool:
    """True where the one-pass kernel computes the same as the torch path."""
    given = [t for t in (*tensors, base, out) if t is not None]
    return (
        len(tensors) <= MAX_FUSED
        and all(t.is_contiguous() and t.is_floating_point() for t in given)
        and all(t.element_size() <= 4 for t in given)
        and not needs_grad(*given)
    )


def _stride(tensor: Tensor, max_elements: int | None) -> int:
    """Step over the flattened tensor that visits at most `max_elements` and all channels."""
    if max_elements is None:
        return 1
    if max_elements < 1:
        raise ValueError(f"max_elements is {max_elements}; it must be at least 1, or None for all.")
    step = max(1, math.ceil(tensor.numel() / max_elements))
    width = tensor.shape[-1] if tensor.dim() else 1
    while step > 1 and math.gcd(step, width) != 1:
        step += 1
    return step
