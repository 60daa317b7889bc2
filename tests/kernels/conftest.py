"""Kernel tests run on NaN: memory from torch.empty holds it, so that a cell nobody wrote shows."""

import os
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("kernel_toys")

# The Triton kernels run on a GPU, or in a process of their own under the interpreter, which has to
# be chosen before anything imports Triton: test_interpreter.py starts that process.
collect_ignore = []
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore.append("triton")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory_starts_as_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    # warn_only: some torch operations on a GPU have no deterministic form, and that is not what is
    # tested.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
