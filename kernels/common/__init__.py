"""What more than one kernel folder needs."""

from .runtime import (
    CPU_FLASH,
    capability,
    interpreted,
    needs_grad,
    on_device,
    pick_backend,
    triton_installed,
)
from .tensors import (
    allocate,
    as_layout,
    check_lengths,
    check_qkv,
    check_scale,
    to_heads_first,
)

__all__ = [
    "CPU_FLASH",
    "allocate",
    "as_layout",
    "capability",
    "check_lengths",
    "check_qkv",
    "check_scale",
    "interpreted",
    "needs_grad",
    "on_device",
    "pick_backend",
    "to_heads_first",
    "triton_installed",
]
