"""Attach to a model and detach from it. The only file that touches how modules are called.

Modules are intercepted at `nn.Module._compiled_call_impl`, the slot that `Module.compile()` fills:
`module(...)` calls it in place of the ordinary call if it is set. So `forward`, `state_dict`,
module order and hooks of others stay untouched; a block compiled before or after keeps its one
graph, with our eager wrapper outside; a skipped block is not onloaded by offloading hooks; and
copies and pickles of the model come without us, for PyTorch leaves that slot out of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from blockcache.engine.blocks import Blocks
from blockcache.engine.parts import Part

Call = Callable[..., Any]


class Engine(Protocol):
    """What the hooks call; `inner` makes the call that was intercepted."""

    denoiser: nn.Module
    blocks: Blocks
    parts: tuple[Part, ...]

    def forward(self, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the denoiser."""

    def block(self, index: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of block `index`."""

    def part(self, number: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of sub-layer `number`."""


class _Hook:
    """Holds the call slot of one module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._compiled: Call | None = None
        self.ensure()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `module(...)` runs now."""
        raise NotImplementedError

    @property
    def inner(self) -> Call:
        """The call without us: the compiled one if the module was compiled by itself."""
        return self._compiled or self._module._call_impl

    def is_in_place(self) -> bool:
        """Whether the module still calls us; `module.compile()` takes the slot away."""
        return self._module._compiled_call_impl is self

    def ensure(self) -> None:
        """Take the slot, again if need be."""
        if not self.is_in_place():
            self._compiled = self._module._compiled_call_impl
            self._module._compiled_call_impl = self

    def remove(self) -> None:
        """Give the slot back as it was."""
        if not self.is_in_place():
            return
        if self._compiled is None:
            del self._module._compiled_call_impl
        else:
            self._module._compiled_call_impl = self._compiled


class BlockHook(_Hook):
    """Routes the calls of one block through the engine."""

    def __init__(self, attachment: "Attachment", index: int, module: nn.Module) -> None:
        """Take over `module`'s calls."""
        self.attachment, self._index = attachment, index
        super().__init__(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `block(...)` runs now."""
        return self.attachment.engine.block(self._index, self.inner, args, kwargs)


class PartHook(_Hook):
    """Routes the calls of one sub-layer through the engine."""

    def __init__(self, attachment: "Attachment", number: int, module: nn.Module) -> None:
        """Take over `module`'s calls."""
        self.attachment, self._number = attachment, number
        super().__init__(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `part(...)` runs now."""
        if torch.compiler.is_compiling():
            # Inside a compiled block: it stays one graph, and nothing of it is reused.
            return self._module._call_impl(*args, **kwargs)
        return self.attachment.engine.part(self._number, self.inner, args, kwargs)


class Attachment(_Hook):
    """Routes the calls of a denoiser, its blocks and their parts through the engine.

    is_traced: the whole model was compiled; the compiler then inlines the blocks' own forwards.
    """

    def __init__(self, engine: Engine) -> None:
        """Attach; if anything fails, what was done is undone."""
        self.engine = engine
        self.is_traced = False
        self._inside: list[BlockHook | PartHook] = []
        try:
            for index, block in enumerate(engine.blocks):
                self._inside.append(BlockHook(self, index, block.module))
            for number, part in enumerate(engine.parts):
                self._inside.append(PartHook(self, number, part.module))
            super().__init__(engine.denoiser)
        except BaseException:
            self._remove_inside()
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `denoiser(...)` runs now."""
        if torch.compiler.is_compiling():
            self.is_traced = True
            return self._module._call_impl(*args, **kwargs)
        for hook in self._inside:
            hook.ensure()
        return self.engine.forward(self.inner, args, kwargs)

    def detach(self) -> None:
        """Remove every hook."""
        self.remove()
        self._remove_inside()

    def _remove_inside(self) -> None:
        for hook in reversed(self._inside):
            hook.remove()
        self._inside = []


@contextmanager
def attached(engine: Engine) -> Iterator[None]:
    """Route the calls of its denoiser through `engine` for the length of a `with` block."""
    attachment = Attachment(engine)
    try:
        yield
    finally:
        attachment.detach()


def attachment_of(denoiser: nn.Module) -> Attachment | None:
    """The attachment of an enabled denoiser, or None. Copies of an enabled model have none."""
    for module in denoiser.modules():
        hook = module._compiled_call_impl
        if isinstance(hook, Attachment):
            return hook
        # The denoiser's own slot is lost where it was compiled as a whole since.
        if isinstance(hook, (BlockHook, PartHook)):
            return hook.attachment
    return None
