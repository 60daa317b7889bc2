"""Find the sub-layers of blocks by structure, and remember what single calls of modules put out.

A block of known kind is left alone inside: its attentions and MLPs are found by what they are (an
attention projects queries, keys and values) and by the names models give their MLPs. Whether an
attention is a cross-attention is seen when it is called.
"""

import inspect
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from blockcache.engine.blocks import Blocks
from blockcache.engine.wiring import Gap, Values, filled, is_opaque, leaf_at, leaves, mapped
from blockcache.plan.recipe import Rule
from blockcache.plan.steps import Step

Kind = Literal["attention", "mlp", "transformer"]

_PROJECTIONS = ({"to_q", "to_k"}, {"to_qkv"}, {"qkv"}, {"to_q", "to_kv"}, {"q_proj", "k_proj"})
_MLP = re.compile(r"(?!.*norm)(.*_)?(mlp|ff|ffn|feed_forward|feedforward|moe)(_.*)?\d*$")
_OTHER_TOKENS = ("encoder_hidden_states", "context")
"""What attentions call the tokens they attend to beside their own."""
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
    """The parts that units of these scopes may be, in the order they are declared.

    A module that several blocks share is none: its calls could not be told apart.
    """
    kinds = {_KINDS[scope] for scope in scopes}
    if not kinds:
        # Looking for them is most of what enabling costs.
        return ()
    inside = [(block, *found) for block in blocks for found in _walk(block.path, block.module)]
    times = Counter(id(module) for *_, module in inside)
    wanted = [
        (block.index, kind, path, module)
        for block, path, kind, module in inside
        if kind in kinds and times[id(module)] == 1
    ]
    return tuple(Part(number, *found) for number, found in enumerate(wanted))


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
    names = tuple(inspect.signature(type(part.module).forward).parameters)[1:]
    bound = dict(zip(names, args, strict=False)) | kwargs
    others = next((bound[name] for name in _OTHER_TOKENS if name in bound), None)
    is_other = isinstance(others, torch.Tensor) and others is not main_input(args, kwargs)
    return "cross" if is_other and isinstance(output, torch.Tensor) else "attn"


def main_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor a module works on: its first one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    return None


@dataclass(frozen=True)
class Seen:
    """A call in a watched forward, of a part or (part None) of the denoiser.

    scope: of the site it belongs to. entered, output: copies of what it got, where a payload may
    need it, and of what it put out.
    """

    part: Part | None
    scope: str
    entered: torch.Tensor | None
    output: Any

    @property
    def number(self) -> int | None:
        """The part's number."""
        return None if self.part is None else self.part.number

    @property
    def name(self) -> str:
        """What messages call it."""
        return "the model" if self.part is None else self.part.path

    def is_within(self, lo: int, hi: int) -> bool:
        """Whether it is in the blocks lo..hi-1."""
        return self.part is None or lo <= self.part.block < hi

    def objection(self) -> str:
        """Why its output cannot be kept, or an empty string."""
        found = [leaf for _, leaf in leaves(self.output)]
        strange = next((leaf for leaf in found if is_opaque(leaf)), None)
        if strange is not None:
            return f"{self.name} returns a {type(strange).__name__}"
        if not any(isinstance(leaf, torch.Tensor) for leaf in found):
            return f"{self.name} returns no tensor"
        return ""


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
    """Steps since it was computed."""
    form: Any = None

    @property
    def steps(self) -> list[Step]:
        """The steps of the stored payloads, newest first."""
        return [step for step, _ in self.history]

    def values(self, rule: Rule, entered: torch.Tensor | None, output: Any) -> Values:
        """What a computed call stores: copies."""
        self.form = mapped(output, Gap.of)
        base = self.base(rule, entered)
        stored = {}
        for path, leaf in leaves(output):
            if isinstance(leaf, torch.Tensor):
                stored[_key(path)] = leaf - base if base is not None else leaf.clone()
        return stored

    def base(self, rule: Rule, entered: torch.Tensor | None) -> torch.Tensor | None:
        """What the payload is added to: the input, of a residual of one tensor of its shape."""
        wanted = rule.payload == "residual" and rule.site.scope in ("model", "transformer")
        if not wanted or entered is None:
            return None
        found = [(path, leaf) for path, leaf in leaves(self.form) if isinstance(leaf, Gap)]
        if len(found) != 1:
            return None
        path, leaf = found[0]
        # A list of one picture is kept like a list of two.
        is_listed = bool(path) and isinstance(leaf_at(self.form, path[:-1]), list)
        fits = (leaf.shape, leaf.dtype) == (entered.shape, entered.dtype)
        return entered if fits and not is_listed else None

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
