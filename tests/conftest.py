"""What every test shares: no network, one thread, small pipelines, no GPU tests without a GPU."""

import os

# Before the hosts are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"  # an accidental download is an error at once
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline

import tiny_pipelines

# The tensors are tiny: more threads are slower, and the order of their sums is not fixed.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """Commands that log to the terminal set the root logger up; the next test must not see it."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)


class Tiny(NamedTuple):
    """A random-weight pipeline and a small run of it; unpacks as `name, pipe, kwargs`."""

    name: str
    pipe: DiffusionPipeline
    kwargs: dict[str, Any]

    @property
    def denoiser(self) -> torch.nn.Module:
        """The module that is called once or more in every step."""
        return tiny_pipelines.denoiser(self.pipe)

    def generate(self, steps: int = 4, seed: int = 0, latent: bool = False, **changes: Any) -> Any:
        """Run it; `changes` replace entries of `kwargs` for this run."""
        return tiny_pipelines.generate(self.pipe, {**self.kwargs, **changes}, steps, seed, latent)


@pytest.fixture
def build_tiny() -> Callable[..., Tiny]:
    """`build_tiny("wan", layers=6)`: a fresh pipeline by name."""

    def build(name: str, **settings: Any) -> Tiny:
        return Tiny(name, *tiny_pipelines.BUILDERS[name](**settings))

    return build


# Built anew for each test: 21 ms on average, where a deep copy of a built one takes 26 ms.
@pytest.fixture(params=list(tiny_pipelines.BUILDERS))
def tiny(request: pytest.FixtureRequest, build_tiny: Callable[..., Tiny]) -> Tiny:
    """Each of the ten pipelines in turn, fresh."""
    return build_tiny(request.param)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
