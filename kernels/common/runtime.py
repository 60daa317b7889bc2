"""Which backend can run here. Triton is never imported by this file."""

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")

# What scaled_dot_product_attention runs on a CPU; called by name it returns the LSE as well.
CPU_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@functools.cache
def triton_installed() -> bool:
    """True where `import triton` can be expected to work."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """True when Triton's CPU interpreter was asked for, as the tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def needs_grad(*tensors: Tensor | None) -> bool:
    """True when autograd would have to differentiate through a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def pick_backend(requested: str | None, tensor: Tensor) -> str:
    """The backend for `tensor`: the requested one, or the best that can run.

    Without a request this is "triton" for CUDA tensors where Triton is installed and "torch"
    otherwise. A request is either met or refused, never replaced.

    Raises:
        ValueError: Unknown name, or a backend that cannot run here.
    """
    runnable = triton_installed() and (tensor.is_cuda or interpreted())
    if requested is None:
        return "triton" if runnable and tensor.is_cuda else "torch"
    if requested not in BACKENDS:
        raise ValueError(f"backend is {requested!r}; supported are {', '.join(BACKENDS)} and None.")
    if requested == "triton" and not runnable:
        raise ValueError(
            f"backend='triton' was asked for tensors on {tensor.device}, with Triton "
            f"{'installed' if triton_installed() else 'not installed'}. It needs CUDA tensors "
            "(or TRITON_INTERPRET=1 for tests); use backend='torch' or None."
        )
    return requested


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's own GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's GPU, 90 for 9.0; 90 off the GPU (interpreter)."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor
