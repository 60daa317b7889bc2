"""What the tests on real pipelines share: one build of each, its uncached result, and a spy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import blockcache
import tiny_pipelines

BLOCKS = {name: 4 for name in tiny_pipelines.BUILDERS} | {"flux": 8, "hunyuan_video": 8, "sd15": 7}


def blocks_of(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks in calling order, found without the library."""
    if hasattr(denoiser, "mid_block"):
        return [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]
    lists = [denoiser.get_submodule(n) for n in LISTS if hasattr(denoiser, n)]
    return [block for blocks in lists for block in blocks]


LISTS = ("transformer_blocks", "blocks", "single_transformer_blocks")


class Spy:
    """Counts the blocks that really run, by their own pre-hooks."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.calls = [0] * len(blocks_of(denoiser))
        self.root = 0
        self._handles = [
            block.register_forward_pre_hook(self._counting(i))
            for i, block in enumerate(blocks_of(denoiser))
        ]
        self._handles.append(denoiser.register_forward_pre_hook(self._count_root))

    def _counting(self, index: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.calls[index] += 1

        return count

    def _count_root(self, *_: Any) -> None:
        self.root += 1

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()


class Shared:
    """A pipeline built once for all tests, and its uncached results by run settings."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipe, self.kwargs = tiny_pipelines.BUILDERS[name]()
        self._plain: dict[Any, torch.Tensor] = {}

    @property
    def denoiser(self) -> torch.nn.Module:
        return tiny_pipelines.denoiser(self.pipe)

    def run(self, steps: int = 4, seed: int = 0, **changes: Any) -> torch.Tensor:
        """The final latents (DiT: the picture)."""
        kwargs = {**self.kwargs, **changes}
        return torch.as_tensor(tiny_pipelines.generate(self.pipe, kwargs, steps, seed, True))

    def plain(self, steps: int = 4, seed: int = 0, **changes: Any) -> torch.Tensor:
        """The same uncached, computed once. Only while nothing is enabled, or if known already."""
        key = (steps, seed, tuple(sorted((k, str(v)) for k, v in changes.items())))
        if key not in self._plain:
            blockcache.disable(self.pipe)
            self._plain[key] = self.run(steps, seed, **changes)
        return self._plain[key]

    @contextmanager
    def spy(self) -> Iterator[Spy]:
        """Count block calls for the length of a `with` block."""
        spy = Spy(self.denoiser)
        try:
            yield spy
        finally:
            spy.remove()


@pytest.fixture(scope="session")
def _built() -> dict[str, Shared]:
    return {}


@pytest.fixture
def shared(_built: dict[str, Shared]) -> Iterator[Callable[[str], Shared]]:
    """`shared("flux")`: a pipeline that other tests use too; always handed on disabled."""
    asked = []

    def get(name: str) -> Shared:
        if name not in _built:
            _built[name] = Shared(name)
        asked.append(_built[name])
        return _built[name]

    yield get
    for one in asked:
        blockcache.disable(one.pipe)


@pytest.fixture(params=list(tiny_pipelines.BUILDERS))
def each(request: pytest.FixtureRequest, shared: Callable[[str], Shared]) -> Shared:
    """Each of the ten pipelines in turn, shared."""
    return shared(request.param)


@pytest.fixture
def block_count() -> dict[str, int]:
    """Blocks of each tiny pipeline."""
    return BLOCKS
