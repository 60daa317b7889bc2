"""Find the sub-layers of blocks by structure, and remember what single calls of modules put out.

A block of known kind is left alone inside: its attentions and MLPs are found by what they are (an
attention projects queries, keys and values) and by the names models give their MLPs. Whether an
attention is a cross-attention is seen when it is called.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from blockcache.engine.blocks import Block, Blocks
from blockcache.engine.wiring import filled, leaves, outline
from blockcache.plan.recipe import Rule
from blockcache.plan.steps import Step

Values = dict[str, torch.Tensor]
Kind = Literal["attention", "mlp", "transformer"]

_PROJECTIONS = ({"to_q", "to_k"}, {"to_qkv"}, {"qkv"}, {"to_q", "to_kv"}, {"q_proj", "k_proj"})
_MLP = re.compile(r"(.*_)?(mlp|ff|ffn|feed_forward|feedforward|moe)(_.*)?\d*$")
_KINDS: dict[str, Kind] = {
    "attn": "attention",
    "cross": "attention",
    "mlp": "mlp",
    "transformer": "transformer",
}


@dataclass(frozen=True)
class Part:
    """A module inside a block: number in order of declaration, its block, kind, path and module."""

    number: int
    block: int
    kind: Kind
    path: str
    module: nn.Module


def find_parts(blocks: Blocks, scopes: Iterable[str]) -> tuple[Part, ...]:
    """The parts that units of these scopes may be, in the order they are declared."""
    kinds = {_KINDS[scope] for scope in scopes}
    found: list[Part] = []
    for block in blocks:
        for path, kind, module in _inside(block):
            if kind in kinds:
                found.append(Part(len(found), block.index, kind, path, module))
    return tuple(found)


def _inside(block: Block) -> Iterator[tuple[str, Kind, nn.Module]]:
    yield from _walk(block.path, block.module)


def _walk(path: str, module: nn.Module) -> Iterator[tuple[str, Kind, nn.Module]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}"
        if any(all(hasattr(child, p) for p in names) for names in _PROJECTIONS):
            yield inner, "attention", child
        elif _MLP.match(name) and any(True for _ in child.children()):
            yield inner, "mlp", child
        else:
            if path.endswith(".transformer_blocks"):
                yield inner, "transformer", child
            yield from _walk(inner, child)


def scope_of(part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> str:
    """The scope of a part, seen from a call: an attention to other tokens is a cross-attention.

    A joint attention also gets the other tokens, but returns them, too.
    """
    if part.kind != "attention":
        return part.kind
    others = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    own = kwargs.get("hidden_states", args[0] if args else None)
    is_cross = (
        isinstance(others, torch.Tensor)
        and others is not own
        and others.is_floating_point()
        and isinstance(output, torch.Tensor)
    )
    return "cross" if is_cross else "attn"


def main_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor a module works on: its first one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    return None


@dataclass(frozen=True)
class Seen:
    """A part's call in a watched forward: its scope, what it got and what it put out (copies)."""

    part: Part
    scope: str
    entered: torch.Tensor | None
    output: Any


@dataclass(eq=False)
class Cell:
    """A call that is reused for itself: a sub-layer's, or the denoiser's own (part None).

    row, rows: which row of the rule's mask is its own.
    """

    rule: int
    row: int
    rows: int
    part: int | None
    history: "deque[tuple[Step, Values]]"
    streak: int = 0
    form: Any = None

    @property
    def steps(self) -> list[Step]:
        """The steps of the stored payloads, newest first."""
        return [step for step, _ in self.history]

    def values(self, rule: Rule, entered: torch.Tensor | None, output: Any) -> Values:
        """What a computed call stores: copies."""
        self.form = outline(output)
        base = self.base(rule, entered)
        stored = {}
        for path, leaf in leaves(output):
            if isinstance(leaf, torch.Tensor):
                stored[_key(path)] = leaf - base if base is not None else leaf.clone()
        return stored

    def base(self, rule: Rule, entered: torch.Tensor | None) -> torch.Tensor | None:
        """What the payload is added to: the input, of a residual of one tensor of its shape."""
        wanted = rule.payload == "residual" and rule.site.scope in ("model", "transformer")
        tensors = [leaf for _, leaf in leaves(self.form) if getattr(leaf, "shape", None)]
        if not wanted or entered is None or len(tensors) != 1 or tensors[0].shape != entered.shape:
            return None
        return entered

    def built(self, values: Values) -> Any:
        """An output in the form of the computed ones."""
        by_path = {
            path: values[_key(path)] for path, _ in leaves(self.form) if _key(path) in values
        }
        return filled(self.form, by_path)

    def cache_bytes(self) -> int:
        """Bytes of the stored payloads."""
        held = (tensor for _, values in self.history for tensor in values.values())
        return sum(t.numel() * t.element_size() for t in held)


def _key(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
