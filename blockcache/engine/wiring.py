"""What flows in and out of the blocks, seen in one full forward.

A *stream* is a tensor that a block hands on to the next one (image tokens, text tokens, audio).
The first forward of every branch computes everything and is watched: an output that *is* the
object which the next block receives names its stream. Nothing relies on class names.
"""

import ast
import functools
import inspect
import textwrap
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from blockcache.engine.blocks import Block, Blocks
from blockcache.engine.groups import as_split

Values = dict[str, torch.Tensor]
"""Tensors by the name of their stream."""
Path = tuple[int | str, ...]
"""Position of a leaf in an output, by number or (of diffusers' output classes) by name; () is the
output itself."""


@dataclass(frozen=True)
class Gap:
    """A tensor of an output that no stream fills: shape, dtype and device only."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Gap":
        """In place of `tensor`."""
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def fill(self) -> torch.Tensor:
        """A tensor of this form without memory of its own. Only skipped blocks ever read it."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


_PLAIN = (torch.Tensor, Gap, bool, int, float, str, type(None))


def is_opaque(leaf: Any) -> bool:
    """Whether a leaf is an object of unknown kind, which may hold tensors that nobody sees."""
    return not isinstance(leaf, _PLAIN)


@dataclass(frozen=True)
class Port:
    """The streams of one block in one branch.

    inputs, outputs: stream name to parameter name and to output position. form: the output with
    every tensor replaced by a Gap, to build outputs of skipped blocks from.
    """

    inputs: dict[str, str]
    outputs: dict[str, Path]
    form: Any

    @functools.cached_property
    def extras(self) -> dict[str, Path]:
        """Output tensors that belong to no stream, such as a U-Net's skip connections."""
        streams = set(self.outputs.values())
        return {
            f"+{'.'.join(map(str, path))}": path
            for path, leaf in leaves(self.form)
            if isinstance(leaf, Gap) and path not in streams
        }

    def build(self, values: Values) -> Any:
        """An output in this block's form, from stream (and extra) values by name."""
        places = self.outputs | self.extras if self.extras else self.outputs
        by_path = {path: values[name] for name, path in places.items() if name in values}
        return filled(self.form, by_path)


@dataclass(frozen=True)
class Wiring:
    """The watched structure of one branch's forward.

    ports: by block number. called: the blocks in calling order (a model may leave some out).
    chains: lengths of the runs of blocks, over all blocks, inside which streams are handed on;
    where the model rearranges them between two lists a new chain begins. skips: pairs (i, j) where
    an output of block i reaches block j past the next one.
    """

    ports: dict[int, Port]
    called: tuple[int, ...]
    chains: tuple[int, ...]
    skips: frozenset[tuple[int, int]]


def bind(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name; nameless positional ones by their position."""
    args, kwargs = as_split(block.module, args, kwargs)
    names = block.parameters
    bound = {names[i] if i < len(names) else f"arg{i}": value for i, value in enumerate(args)}
    return bound | kwargs


def is_record(value: Any) -> bool:
    """Whether it is one of diffusers' output classes, which are dictionaries and tuples in one."""
    return isinstance(value, dict) and hasattr(value, "to_tuple")


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested tuples, lists and output classes with their positions."""
    if is_record(value):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path, value


def leaf_at(value: Any, path: Path) -> Any:
    """The leaf at a position."""
    for i in path:
        value = value[i]
    return value


def rebuilt(container: Any, items: list[Any]) -> Any:
    """A tuple, named tuple, list or output class of the same type with other items."""
    if is_record(container):
        return type(container)(**dict(zip(container, items, strict=True)))
    is_named = hasattr(container, "_fields")
    return type(container)(*items) if is_named else type(container)(items)


def filled(form: Any, values: dict[Path, torch.Tensor], path: Path = ()) -> Any:
    """An output in `form` with these tensors at their positions; gaps elsewhere are filled."""
    if is_record(form):
        return rebuilt(form, [filled(item, values, (*path, k)) for k, item in form.items()])
    if isinstance(form, (tuple, list)):
        return rebuilt(form, [filled(item, values, (*path, i)) for i, item in enumerate(form)])
    if path in values:
        return values[path]
    return form.fill() if isinstance(form, Gap) else form


def mapped(output: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """An output with `change` applied to every tensor in it."""
    if is_record(output):
        return rebuilt(output, [mapped(item, change) for item in output.values()])
    if isinstance(output, (tuple, list)):
        return rebuilt(output, [mapped(item, change) for item in output])
    return change(output) if isinstance(output, torch.Tensor) else output


@dataclass
class _Call:
    index: int
    shapes: dict[str, torch.Size | None]
    """Shapes of the arguments by name, None for what is no tensor."""
    ids: dict[str, int]
    outputs: list[tuple[Path, "weakref.ref[torch.Tensor]"]] = field(default_factory=list)
    form: Any = None
    links: dict[Path, str] = field(default_factory=dict)
    """Output position to the parameter name under which the next block received it."""


class Watch:
    """Watches one forward. Holds no tensor alive but through weak references."""

    def __init__(self, blocks: Blocks) -> None:
        """Prepare to watch `blocks`."""
        self._blocks = blocks.blocks
        self._unet = blocks.unet
        self._calls: list[_Call] = []
        self._skips: set[tuple[int, int]] = set()
        self._kept: set[tuple[int, Path]] = set()
        self._handed: set[tuple[int, Path]] = set()

    def before(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Note the inputs of a block; returns them by name."""
        bound = bind(self._blocks[index], args, kwargs)
        if not self._unet:
            self._note_what_is_kept()
        for name, argument in bound.items():
            for _, value in leaves(argument):
                if isinstance(value, torch.Tensor):
                    self._link(index, name, value)
        shapes = {k: v.shape if isinstance(v, torch.Tensor) else None for k, v in bound.items()}
        self._calls.append(_Call(index, shapes, {name: id(v) for name, v in bound.items()}))
        return bound

    def after(self, output: Any) -> None:
        """Note the output of the block that was called last."""
        call = self._calls[-1]
        call.form = mapped(output, Gap.of)
        call.outputs = [
            (path, weakref.ref(leaf))
            for path, leaf in leaves(output)
            if isinstance(leaf, torch.Tensor)
        ]

    def _link(self, index: int, name: str, value: torch.Tensor) -> None:
        for distance, earlier in enumerate(reversed(self._calls)):
            for path, reference in earlier.outputs:
                if reference() is value:
                    if distance == 0:
                        earlier.links[path] = name
                    else:
                        self._skips.add((earlier.index, index))
                        self._kept.discard((earlier.index, path))
                        self._handed.add((earlier.index, path))
                    return

    def _note_what_is_kept(self) -> None:
        """Earlier outputs that still live are kept by the model for a later use of its own.

        Where they go is not known, unless a later block gets the very object: they count as going
        past every block.
        """
        handed_on = {id(r()) for _, r in self._calls[-1].outputs} if self._calls else set()
        for earlier in self._calls[:-1]:
            for path, reference in earlier.outputs:
                tensor, place = reference(), (earlier.index, path)
                is_kept = tensor is not None and id(tensor) not in handed_on
                if is_kept and place not in self._handed:
                    self._kept.add(place)

    def _unet_skips(self, ports: dict[int, Port]) -> set[tuple[int, int]]:
        """Down blocks feed the mirror image's up blocks, through tuples that the model rebuilds."""
        last = len(self._blocks) - 1
        return {(i, last - i) for i, port in ports.items() if port.extras}

    def wiring(self) -> Wiring:
        """What was seen.

        Raises:
            ValueError: a block was called twice, or the streams of a block cannot be told.
        """
        called = tuple(call.index for call in self._calls)
        if any(b <= a for a, b in zip(called, called[1:], strict=False)):
            raise ValueError("the blocks are not called once each in the order they are declared")
        ports = {call.index: self._port(i) for i, call in enumerate(self._calls)}
        kept = {(index, len(self._blocks)) for index, _ in self._kept}
        skips = self._unet_skips(ports) if self._unet else self._skips | kept
        return Wiring(ports, called, self._chains(), frozenset(skips))

    def _port(self, position: int) -> Port:
        call = self._calls[position]
        # In the order of the parameters, so that the first stream is the main one.
        order = {name: i for i, name in enumerate(self._blocks[call.index].parameters)}
        named = sorted(
            self._stream_names(position).items(), key=lambda item: order.get(item[1], 99)
        )
        outputs = {name: path for path, name in named}
        inputs = {name: name for name in outputs if name in call.shapes}
        if not inputs:
            raise ValueError(
                f"cannot tell which output of {self._blocks[call.index].path} is which stream"
            )
        return Port(inputs, outputs, call.form)

    def _stream_names(self, position: int) -> dict[Path, str]:
        """Output position to stream name, for each position by the best evidence there is.

        A stream that the model changes between two blocks (ControlNet) is not seen to be handed on;
        its name then comes from another block of the kind, or from the source.
        """
        call = self._calls[position]
        opaque = [leaf for _, leaf in leaves(call.form) if is_opaque(leaf)]
        if opaque:
            block, kind = self._blocks[call.index], type(opaque[0]).__name__
            raise ValueError(f"cannot tell which stream is which: {block.path} returns a {kind}")
        names = dict(call.links)
        for evidence in (*self._links_of_its_kind(call), self._written_names(call)):
            for path, name in evidence.items():
                if path not in names and name not in names.values():
                    names[path] = name
        return names or self._only_tensor(call)

    def _links_of_its_kind(self, call: _Call) -> Iterator[dict[Path, str]]:
        kind = type(self._blocks[call.index].module)
        for other in self._calls:
            if type(self._blocks[other.index].module) is kind and _nest_alike(
                other.form, call.form
            ):
                yield other.links

    def _written_names(self, call: _Call) -> dict[Path, str]:
        forward = type(self._blocks[call.index].module).forward
        written = _returned_names(forward)
        paths = [path for path, _ in leaves(call.form)]
        if len(written) != len(paths):
            return {}
        return {p: n for p, n in zip(paths, written, strict=True) if n in call.shapes}

    def _only_tensor(self, call: _Call) -> dict[Path, str]:
        tensors = [name for name, shape in call.shapes.items() if shape is not None]
        # What every block gets as the same object (time embedding, mask) is no stream.
        changing = [n for n in tensors if len({c.ids.get(n) for c in self._calls}) > 1]
        tensors = changing or tensors
        if tensors and (isinstance(call.form, Gap) or self._unet):
            return {(() if isinstance(call.form, Gap) else (0,)): tensors[0]}
        return {}

    def _chains(self) -> tuple[int, ...]:
        starts = [0]
        for before, call in zip(self._calls, self._calls[1:], strict=False):
            if self._is_broken(before, call):
                starts.append(call.index)
        ends = [*starts[1:], len(self._blocks)]
        return tuple(end - start for start, end in zip(starts, ends, strict=True))

    def _is_broken(self, before: _Call, call: _Call) -> bool:
        """Between two lists the model may rearrange the streams; then nothing links them."""
        a, b = self._blocks[before.index], self._blocks[call.index]
        if a.group == b.group or self._unet:
            return False
        handed_on = set(before.links.values())
        for name, path in self._port(self._calls.index(before)).outputs.items():
            form = leaf_at(before.form, path)
            arrives = isinstance(form, Gap) and call.shapes.get(name) == form.shape
            if name not in handed_on and not arrives:
                return True
        return not handed_on


def _nest_alike(a: Any, b: Any) -> bool:
    """Whether two forms nest alike; a stream that ends (None) may stand for a tensor."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_nest_alike(x, y) for x, y in zip(a, b, strict=True))
    return not isinstance(a, (tuple, list)) and not isinstance(b, (tuple, list))


@functools.lru_cache(maxsize=256)
def _returned_names(forward: Callable[..., Any]) -> list[str]:
    """Names in the last `return a, b` of a forward's source; empty if it returns expressions."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return []
    returns = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    last = returns[-1] if returns else None
    items = last.elts if isinstance(last, ast.Tuple) else [last]
    return [item.id for item in items if isinstance(item, ast.Name)]
