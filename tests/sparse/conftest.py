"""Planner tests run on NaN: memory from torch.empty holds it, so that a cell nobody wrote shows."""

from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("sparse_toys")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def memory_starts_as_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
