"""What a measurement was made with: versions and machine, for tables and problem reports."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

LIBRARIES = (
    "blockcache",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "triton",
    "torchmetrics",
)
OPTIONAL = ("gradio", "imageio", "lpips", "peft")


def versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Python and library versions; "not installed" where a library is missing."""
    return {"python": platform.python_version(), **{name: _version(name) for name in libraries}}


def machine(device: torch.device | str = "cpu") -> dict[str, str]:
    """The device's name, the system and the number of threads torch uses."""
    device = torch.device(device)
    found = {"device": str(device), "cpu": _cpu_name(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
    return {**found, "cores": str(os.cpu_count()), "system": platform.platform(terse=True)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
