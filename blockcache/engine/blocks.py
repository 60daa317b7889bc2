"""Find the blocks of a denoiser by structure.

A block list is an `nn.ModuleList` of composite modules, a direct child of the denoiser, whose
elements take hidden states. A U-Net is recognised by its down, mid and up blocks. What flows in and
out of a block is not decided here but seen in the first forward (`wiring.py`).
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from blockcache.errors import UnsupportedModelError

# Lists beside the main chain: text refiners, projections, hint encoders. Their blocks run once on
# other tokens, so skipping them buys nothing and their streams link to nothing.
_SIDE_LIST_WORDS = (
    "refiner",
    "caption",
    "proj",
    "text_",
    "txt_",
    "vace_",
    "face_",
    "perceiver",
    "controlnet",
    "adapter",
    "embed",
    "norm",
)

# Main lists by class, for models whose structure misleads the search above.
_OVERRIDES: dict[str, tuple[str, ...]] = {
    # The temporal list alternates with the spatial one on reshaped tokens.
    "LatteTransformer3DModel": ("transformer_blocks",),
}


@dataclass(frozen=True)
class Block:
    """One block: its number in calling order, dotted path, list it is in, and the module.

    parameters: names of its forward's parameters, in order; empty where it takes only *args.
    """

    index: int
    path: str
    group: str
    module: nn.Module
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Blocks:
    """The blocks of one denoiser, in the order they are declared to be called."""

    blocks: tuple[Block, ...]
    unet: bool

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        """The blocks in order."""
        return iter(self.blocks)


def find_blocks(denoiser: nn.Module) -> Blocks:
    """The blocks of `denoiser`.

    Raises:
        UnsupportedModelError: no block list was found, or one block only.
    """
    unet = _unet_blocks(denoiser)
    pairs = unet or list(_listed_blocks(denoiser))
    if len(pairs) < 2:
        raise UnsupportedModelError(_nothing_found(denoiser))
    if len({id(module) for _, module in pairs}) < len(pairs):
        raise UnsupportedModelError(
            f"{type(denoiser).__name__}: a module is in its block lists twice; blocks that share "
            "their weights cannot be told apart"
        )
    blocks = tuple(
        Block(i, path, path.split(".")[0], module, _forward_parameters(module))
        for i, (path, module) in enumerate(pairs)
    )
    return Blocks(blocks, unet=bool(unet))


def _unet_blocks(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    down, up = getattr(denoiser, "down_blocks", None), getattr(denoiser, "up_blocks", None)
    middle = getattr(denoiser, "mid_block", None)
    if not (isinstance(down, nn.ModuleList) and isinstance(up, nn.ModuleList)):
        return []
    if not isinstance(middle, nn.Module):
        return []
    found = [(f"down_blocks.{i}", module) for i, module in enumerate(down)]
    found.append(("mid_block", middle))
    return found + [(f"up_blocks.{i}", module) for i, module in enumerate(up)]


def _listed_blocks(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    wanted = _OVERRIDES.get(type(denoiser).__name__)
    for name, child in denoiser.named_children():
        if not isinstance(child, nn.ModuleList) or not len(child):
            continue
        if name in wanted if wanted is not None else _is_main_list(name, child):
            yield from ((f"{name}.{i}", module) for i, module in enumerate(child))


def _is_main_list(name: str, modules: nn.ModuleList) -> bool:
    if any(word in name.lower() for word in _SIDE_LIST_WORDS):
        return False
    return all(any(True for _ in m.children()) and not _is_container(m) for m in modules)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))


def _forward_parameters(module: nn.Module) -> tuple[str, ...]:
    # The class's own forward: instances may carry wrappers by offloading or compiling.
    plain = getattr(module, "_orig_mod", module)
    parameters = inspect.signature(type(plain).forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)[1:]


def _nothing_found(denoiser: nn.Module) -> str:
    lists = [n for n, m in denoiser.named_modules() if isinstance(m, nn.ModuleList)]
    seen = ", ".join(lists[:8]) or "none"
    return (
        f"{type(denoiser).__name__}: found no list of at least two blocks to cache "
        f"(module lists seen: {seen}). Supported are models whose blocks are a direct child "
        "ModuleList, and U-Nets with down_blocks, mid_block and up_blocks. To add one, name its "
        "lists in blockcache/engine/blocks.py, see docs/add-a-model.md"
    )
