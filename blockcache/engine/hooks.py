"""Attach to a model and detach from it. The only file that touches how modules are called.

Blocks are intercepted at `nn.Module._compiled_call_impl`, the slot that `Module.compile()` fills:
`module(...)` calls it in place of the ordinary call if it is set. So `forward`, `state_dict`,
module order and hooks of others stay untouched; a block compiled before or after keeps its one
graph, with our eager wrapper outside; a skipped block is not onloaded by offloading hooks; and
copies and pickles of the model come without us, for PyTorch leaves that slot out of them.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Call = Callable[..., Any]


class Engine(Protocol):
    """What the hooks call."""

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the denoiser's forward."""

    def block(self, index: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of block `index`; `inner` calls the block itself."""

    def end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the denoiser's forward, also when it raised. Not None replaces the output."""


class BlockHook:
    """Routes the calls of one block through the engine."""

    def __init__(self, engine: Engine, index: int, module: nn.Module) -> None:
        """Take over `module`'s calls."""
        self._engine, self._index, self._module = engine, index, module
        self._compiled: Call | None = None
        self.ensure()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `module(...)` runs now."""
        inner = self._compiled or self._module._call_impl
        return self._engine.block(self._index, inner, args, kwargs)

    def ensure(self) -> None:
        """Take the slot again if `module.compile()` has overwritten it since."""
        current = self._module._compiled_call_impl
        if current is not self:
            self._compiled = current
            self._module._compiled_call_impl = self

    def remove(self) -> None:
        """Give the slot back as it was."""
        if self._module._compiled_call_impl is not self:
            return
        if self._compiled is None:
            del self._module._compiled_call_impl
        else:
            self._module._compiled_call_impl = self._compiled


class RootHook:
    """Tells the engine of the denoiser's calls. A copied or unpickled hook is inert."""

    def __init__(self, engine: Engine | None, blocks: list[BlockHook] | None = None) -> None:
        """Remember the engine; None makes a hook that does nothing."""
        self.engine = engine
        self.is_traced = False
        self.attachment: Attachment | None = None
        self._blocks = blocks or []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if self.engine is None:
            return
        if torch.compiler.is_compiling():
            # The compiler inlines the blocks' own forwards: nothing can be reused.
            self.is_traced = True
            return
        for block in self._blocks:
            block.ensure()
        self.engine.begin(args, kwargs)

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Forward hook."""
        if self.engine is None or torch.compiler.is_compiling():
            return None
        return self.engine.end(args, kwargs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RootHook":
        """A copy of the model is a plain model."""
        return RootHook(None)

    def __reduce__(self) -> tuple[type, tuple[None]]:
        """So is a pickled one."""
        return RootHook, (None,)


class Attachment:
    """All hooks of one denoiser. `detach` restores it exactly."""

    def __init__(self, engine: Engine, denoiser: nn.Module, blocks: list[nn.Module]) -> None:
        """Attach; if any part fails, what was done is undone."""
        self.engine = engine
        self._blocks: list[BlockHook] = []
        self._handles: list[RemovableHandle] = []
        try:
            self._blocks = [BlockHook(engine, i, module) for i, module in enumerate(blocks)]
            self.root = RootHook(engine, self._blocks)
            self.root.attachment = self
            before = denoiser.register_forward_pre_hook(self.root.before, with_kwargs=True)
            self._handles.append(before)
            after = denoiser.register_forward_hook(
                self.root.after, with_kwargs=True, always_call=True
            )
            self._handles.append(after)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            block.remove()
        self._handles, self._blocks = [], []


def attachment_of(denoiser: nn.Module) -> Attachment | None:
    """The attachment of an enabled denoiser, or None. Copies of an enabled model have none."""
    for hook in denoiser._forward_pre_hooks.values():
        root = getattr(hook, "__self__", None)
        if isinstance(root, RootHook) and root.engine is not None:
            return root.attachment
    return None
