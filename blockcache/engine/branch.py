"""The state of one branch of one run: histories, streaks, and who does what in a forward."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

import torch

from blockcache.engine import signals
from blockcache.engine.blocks import Blocks
from blockcache.engine.deciding import Decider, GateDecider, decider_for
from blockcache.engine.geometry import Arrangement
from blockcache.engine.parts import Cell, Seen
from blockcache.engine.stats import BranchStats
from blockcache.engine.wiring import Port, Values, Wiring, bind, leaf_at
from blockcache.kernels.linear_combine import linear_combine
from blockcache.plan.forecasts import ProbeRatio, ScaleShift
from blockcache.plan.recipe import Recipe, Rule
from blockcache.plan.sites import Layout
from blockcache.plan.steps import Step


@dataclass(frozen=True)
class Anchor:
    """A payload and the step it was computed in."""

    step: Step
    payload: Values


@dataclass(eq=False)
class Unit:
    """One piece of a rule's site: blocks first..last (as called), reused or computed as one.

    row, rows: which row of the rule's mask is its own. keeps_extras: outputs beside the streams
    are read outside the unit, so they belong to the payload.
    """

    rule: int
    row: int
    rows: int
    first: int
    last: int
    keeps_extras: bool
    history: deque[Anchor]
    streak: int = 0
    """Steps since it was computed."""
    needs_input: ClassVar[bool] = True

    def covers(self, index: int) -> bool:
        """Whether block `index` is part of the unit."""
        return self.first <= index <= self.last

    def contains(self, other: "Unit") -> bool:
        """Whether all of `other` is part of the unit."""
        return self.first <= other.first and other.last <= self.last

    def cuts(self, index: int) -> bool:
        """Whether the unit goes on behind block `index`, which is part of it."""
        return self.first <= index < self.last

    def crosses(self, other: "Unit") -> bool:
        """Whether the two overlap and neither contains the other."""
        overlap = self.first <= other.last and other.first <= self.last
        return overlap and not self.contains(other) and not other.contains(self)


@dataclass(frozen=True)
class Role:
    """What happens at one block in one forward. The common case, nothing, is no role at all.

    ask: deciders that decide when the block is entered. enter, leave: computing units, and deciders
    that look at blocks, that begin or end here. skip: the reused unit that covers the block.
    """

    ask: tuple[Decider, ...]
    enter: tuple[Unit | Decider, ...]
    leave: tuple[Unit | Decider, ...]
    skip: Unit | None


@dataclass(frozen=True)
class Course:
    """Who does what in a forward that reuses certain units.

    roles: by block number. skipped: the blocks that are not called. computed: numbers of the units
    that are called as a whole, with true inputs and outputs.
    """

    roles: dict[int, Role]
    skipped: frozenset[int]
    computed: frozenset[int]


@dataclass(eq=False)
class Branch:
    """One branch of one run. It begins unwired: its first forward is computed and watched."""

    recipe: Recipe
    blocks: Blocks
    stats: BranchStats
    wiring: Wiring | None = None
    form: tuple[Any, ...] = ()
    step: int = -1
    """Form and step of the last call."""
    latents: torch.Tensor | None = None
    """What the denoiser got in the last call."""
    arrangement: Arrangement | None = None
    """Where its tokens lie, if a rule wants to know and it is known."""
    units: list[Unit] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    deciders: list[Decider] = field(default_factory=list)
    is_layered: bool = False
    """Whether sites overlap, so that one may be skipped while another one is due."""
    _cells_of: dict[int | None, tuple[int, ...]] = field(default_factory=dict)
    _courses: dict[frozenset[int], Course] = field(default_factory=dict)
    _alike: dict[int, bool] = field(default_factory=dict)
    _tables: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Which of a step's denoiser calls it is."""
        return int(self.stats.name)

    def wire(self, wiring: Wiring, seen: Sequence[Seen]) -> list[str]:
        """Lay the rules out on what was seen. Returns why a site had to be left out, if any."""
        self.wiring = wiring
        self.units, self.cells, self.deciders = [], [], []
        self._courses, self._alike = {}, {}
        layout = Layout(wiring.chains, self.blocks.unet)
        refused: list[str] = []
        for number, rule in enumerate(self.recipe.rules):
            if not rule.is_for(self.number):
                continue
            decider = decider_for(number, rule, self)
            if decider is not None:
                self.deciders.append(decider)
            if rule.site.is_sub_layer or rule.site.scope == "model":
                refused += self._add_cells(number, rule, seen)
                continue
            pieces = rule.site.units(layout)
            for row, (lo, hi) in enumerate(pieces):
                unit = self._unit(number, rule, row, len(pieces), lo, hi)
                why = "no block of the site is called" if unit is None else self._objection(unit)
                if unit is None or why:
                    refused.append(f"{rule.site.scope} {lo}..{hi}: {why}")
                    continue
                self.units.append(unit)
        self.settle()
        self.is_layered = self._overlap(seen)
        return refused

    def settle(self) -> None:
        """Take notice that units or cells were left out."""
        self.deciders = [d for d in self.deciders if self.of_rule(d.number)]
        self._cells_of, self._courses = {}, {}
        for number, cell in enumerate(self.cells):
            self._cells_of[cell.part] = (*self._cells_of.get(cell.part, ()), number)

    def _overlap(self, seen: Sequence[Seen]) -> bool:
        if any(a.covers(b.first) or b.covers(a.first) for a, b in combinations(self.units, 2)):
            return True
        if None in self._cells_of and len(self.reusables) > 1:
            return True
        scopes = {self.recipe.rules[cell.rule].site.scope for cell in self.cells}
        is_nested = "transformer" in scopes and len(scopes) > 1
        is_shared = len(self._cells_of) < len(self.cells)
        blocks = {s.part.block for s in seen if s.part is not None and self.cells_of(s.number)}
        return is_nested or is_shared or any(u.covers(i) for u in self.units for i in blocks)

    def _unit(self, number: int, rule: Rule, row: int, rows: int, lo: int, hi: int) -> Unit | None:
        inside = [i for i in self._wired.called if lo <= i < hi]
        if not inside:
            return None
        history: deque[Anchor] = deque(maxlen=rule.depth)
        keeps = any(i == inside[-1] for i, _ in self._wired.skips)
        return Unit(number, row, rows, inside[0], inside[-1], keeps, history)

    def _objection(self, unit: Unit) -> str:
        """Why a unit cannot be skipped as a whole, or an empty string."""
        for i, j in self._wired.skips:
            if unit.first <= i < unit.last < j:
                where = f"block {j}" if j < len(self.blocks) else "something behind it"
                return f"block {i} also feeds {where} by a skip connection"
        if not self.blocks.unet:
            for i in self._wired.called:
                if unit.covers(i) and self._wired.ports[i].extras:
                    return f"{self.blocks.blocks[i].path} returns tensors that are no streams"
        return ""

    def _add_cells(self, number: int, rule: Rule, seen: Sequence[Seen]) -> list[str]:
        """Lay a rule out on the calls that were seen. Returns why some had to be left out."""
        lo, hi = rule.site.limits(len(self.blocks))
        inside = [s for s in seen if s.scope == rule.site.scope and s.is_within(lo, hi)]
        times = Counter(s.number for s in inside)
        calls: list[int | None] = []
        refused: list[str] = []
        for s in inside:
            twice = f"{s.name} is called more than once in a step" if times[s.number] > 1 else ""
            why = twice or s.objection()
            if why:
                refused.append(f"{rule.site.scope}: {why}")
            else:
                calls.append(s.number)
        self.cells += [
            Cell(number, row, len(calls), part, deque(maxlen=rule.depth))
            for row, part in enumerate(calls)
        ]
        return refused

    @property
    def _wired(self) -> Wiring:
        if self.wiring is None:
            raise RuntimeError("the branch has not been watched yet")
        return self.wiring

    @property
    def called(self) -> tuple[int, ...]:
        """The blocks in calling order."""
        return self._wired.called

    def port(self, index: int) -> Port:
        """The streams of block `index`."""
        return self._wired.ports[index]

    def main_stream(self, index: int) -> str:
        """Parameter name of the main stream that enters block `index`."""
        return next(iter(self.port(index).inputs.values()))

    @property
    def reusables(self) -> list[Unit | Cell]:
        """Units and cells."""
        return [*self.units, *self.cells]

    def of_rule(self, number: int) -> list[Unit | Cell]:
        """The units and cells of a rule."""
        return [part for part in self.reusables if part.rule == number]

    def numbers_of(self, rule: int) -> frozenset[int]:
        """The numbers of a rule's units."""
        return frozenset(i for i, unit in enumerate(self.units) if unit.rule == rule)

    def group_of(self, part: Unit | Cell) -> str:
        """The list that a unit's blocks are in."""
        return self.blocks.blocks[part.first].group if isinstance(part, Unit) else ""

    def cells_of(self, part: int | None) -> tuple[int, ...]:
        """The numbers of a part's cells (None: the denoiser's), in the order of their rules."""
        return self._cells_of.get(part, ())

    def reused_cell(self, part: int | None, reused: frozenset[int]) -> Cell | None:
        """The cell that stands for a part's call when the cells numbered in `reused` are reused."""
        return next((self.cells[i] for i in self.cells_of(part) if i in reused), None)

    def compatible(self, wanted: set[int]) -> frozenset[int]:
        """Of overlapping units neither of which contains the other, only the earlier rule's."""
        kept: list[int] = []
        for number in sorted(wanted):
            unit = self.units[number]
            if not any(unit.crosses(self.units[other]) for other in kept):
                kept.append(number)
        return frozenset(kept)

    def course(self, reused: frozenset[int]) -> Course:
        """Who does what when exactly the units numbered in `reused` are reused."""
        if reused not in self._courses:
            self._courses[reused] = self._make_course([self.units[i] for i in sorted(reused)])
        return self._courses[reused]

    def roles(self, reused: frozenset[int]) -> dict[int, Role]:
        """Roles by block number when exactly the units numbered in `reused` are reused."""
        return self.course(reused).roles

    def _make_course(self, reused: Sequence[Unit]) -> Course:
        skipping = {i: self._outermost(i, reused) for i in self._wired.called}
        computed = frozenset(i for i, u in enumerate(self.units) if self._is_active(u, reused))
        looking = [d for d in self.deciders if self._is_looked_at(d, reused)]
        active: list[Unit | Decider] = [self.units[i] for i in sorted(computed)]
        active += [d for d in looking if not d.at_entry]
        roles = {}
        for i in self._wired.called:
            ask = tuple(d for d in looking if d.at_entry and d.first == i)
            enter = tuple(part for part in active if part.first == i)
            leave = tuple(part for part in active if part.last == i)
            if ask or enter or leave or skipping[i]:
                roles[i] = Role(ask, enter, leave, skipping[i])
        return Course(roles, frozenset(i for i, u in skipping.items() if u), computed)

    def _is_looked_at(self, decider: Decider, reused: Sequence[Unit]) -> bool:
        """Whether a decider's blocks carry true values, and its site is not another rule's."""
        if decider.first > decider.last:
            return False
        others = [unit for unit in reused if unit.rule != decider.number]
        # What enters a rule's own site is there to be seen even if the site is skipped.
        hiding = others if decider.at_entry else reused
        if any(h.covers(decider.first) or h.cuts(decider.last) for h in hiding):
            return False
        own = [unit for unit in self.units if unit.rule == decider.number]
        return not all(any(other.contains(unit) for other in others) for unit in own)

    @staticmethod
    def _outermost(index: int, reused: Sequence[Unit]) -> Unit | None:
        """The widest reused unit over a block; among equals the earlier rule's."""
        over = [u for u in reused if u.covers(index)]
        return max(over, key=lambda u: u.last - u.first, default=None)

    @staticmethod
    def _is_active(unit: Unit, reused: Sequence[Unit]) -> bool:
        """Whether a unit is computed, with true inputs and outputs, while `reused` are skipped."""
        if unit in reused:
            return False
        return not any(
            (r.covers(unit.first) or r.covers(unit.last)) and not unit.contains(r) for r in reused
        )

    def inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values:
        """The streams that enter block `index`."""
        bound = bind(self.blocks.blocks[index], args, kwargs)
        return self.streams(index, bound)

    def streams(self, index: int, bound: dict[str, Any]) -> Values:
        """The streams among arguments that were bound already."""
        port = self._wired.ports[index]
        found = {name: bound.get(parameter) for name, parameter in port.inputs.items()}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def payload(self, unit: Unit, entered: Values, output: Any) -> Values:
        """What a computed unit stores. `entered` must be copies: they are overwritten."""
        port = self._wired.ports[unit.last]
        stored: Values = {}
        for name, path in port.outputs.items():
            value = leaf_at(output, path)
            if isinstance(value, torch.Tensor) and name in entered:
                stored[name] = self._encoded(unit, entered[name], value)
        if unit.keeps_extras:
            stored |= {n: leaf_at(output, p).clone() for n, p in port.extras.items()}
        return stored

    def _encoded(self, unit: Unit, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        if not self._is_residual(unit, entered, left):
            return left.clone()
        return torch.sub(left, entered, out=entered)

    def _is_residual(self, unit: Unit, entered: torch.Tensor, left: torch.Tensor) -> bool:
        wanted = self.recipe.rules[unit.rule].payload == "residual"
        # A U-Net's parts change the shape; there the output itself is what can be kept.
        return wanted and entered.shape == left.shape and entered.dtype == left.dtype

    def predict(self, unit: Unit, at: Step, entered: Values) -> Values:
        """The unit's outputs at step `at`, from its history and the streams that enter it."""
        port = self._wired.ports[unit.last]
        rule = self.recipe.rules[unit.rule]
        steps = [anchor.step for anchor in unit.history]
        weights = self._weights(rule, unit.rule, at, steps)
        anchors = [anchor.payload for anchor in unit.history][: len(weights)]
        values = {}
        for name, newest in anchors[0].items():
            base = entered.get(name)
            form = leaf_at(port.form, port.outputs[name]) if name in port.outputs else None
            add = base is not None and form is not None and self._is_residual(unit, base, form)
            history = [anchor.get(name, newest) for anchor in anchors]
            values[name] = self._combined(
                rule, unit, name, at, history, weights, base if add else None
            )
        return values

    def mixed(self, unit: Unit, at: Step, entered: Values, output: Any, rows: signals.Rows) -> Any:
        """A computed unit's output with the prediction for the samples that are not in `rows`."""
        port = self._wired.ports[unit.last]
        predicted = self.predict(unit, at, entered)
        values = {}
        for name, path in (port.outputs | port.extras).items():
            fresh = leaf_at(output, path)
            if isinstance(fresh, torch.Tensor):
                values[name] = signals.chosen_rows(fresh, predicted.get(name), rows)
        return port.build(values)

    @staticmethod
    def mixed_payload(unit: Unit, payload: Values, rows: signals.Rows) -> Values:
        """A fresh payload with the last one of the samples that are not in `rows`."""
        last = unit.history[0].payload
        return {name: signals.chosen_rows(x, last.get(name), rows) for name, x in payload.items()}

    def predict_cell(self, cell: Cell, at: Step, entered: torch.Tensor | None) -> Any:
        """The output of a reused call at step `at`."""
        rule = self.recipe.rules[cell.rule]
        weights = self._weights(rule, cell.rule, at, cell.steps)
        anchors = [values for _, values in cell.history][: len(weights)]
        base = cell.base(rule, entered)
        values = {}
        for name in anchors[0]:
            history = [anchor[name] for anchor in anchors]
            values[name] = self._combined(rule, cell, name, at, history, weights, base)
        return cell.built(values)

    def corrected_cell(self, cell: Cell, at: Step, gap: Sequence[Step], output: Any) -> Any:
        """A computed output that makes good what the prediction did wrong in the steps of `gap`."""
        rule = self.recipe.rules[cell.rule]
        if rule.corrector is None or len(gap) != cell.streak:
            return output
        weights = rule.corrector.weights(at, gap, cell.steps, rule.predictor)
        if weights is None:
            return output
        older = [values for _, values in cell.history]
        fresh = cell.values(rule, None, output)
        return cell.built(
            {
                name: linear_combine([y, *(o[name] for o in older)], weights)
                for name, y in fresh.items()
            }
        )

    def _combined(
        self,
        rule: Rule,
        unit: Unit | Cell,
        name: str,
        at: Step,
        history: Sequence[torch.Tensor],
        weights: Sequence[Any],
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        """`base + sum_j w_j y_j`, with the predictor's scale and shift where it has them."""
        affine = self.affine(rule, unit, name, at, history[0])
        if affine is None and not any(isinstance(w, torch.Tensor) for w in weights):
            combined: torch.Tensor = linear_combine(history, weights, base)
            return combined
        total = torch.zeros_like(history[0], dtype=torch.float32)
        for weight, payload in zip(weights, history, strict=True):
            total += weight * payload
        if affine is not None:
            scale, shift = affine
            total = total * scale + shift
        if base is not None:
            total += base
        return total.to(history[0].dtype if base is None else base.dtype)

    def affine(
        self, rule: Rule, unit: Unit | Cell, name: str, at: Step, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scale and shift `[channels]` for a stream of a reused unit, if its predictor has them."""
        table = self._table(rule, name, like)
        if table is None:
            return None
        step = min(at.index * table.shape[1] // at.total, table.shape[1] - 1)
        scale, shift = table[min(unit.row, len(table) - 1), step]
        return scale, shift

    def _table(self, rule: Rule, name: str, like: torch.Tensor) -> torch.Tensor | None:
        """Scales and shifts of a stream, `[units, steps, 2, channels]`, on its device."""
        if not isinstance(rule.predictor, ScaleShift):
            return None
        for table in rule.predictor.tables:
            key = (id(table), str(like.device))
            if table.stream in ("", name) and table.shape[3] == like.shape[-1]:
                if key not in self._tables:
                    self._tables[key] = torch.from_numpy(table.array()).to(like.device)
                return self._tables[key]
        return None

    def _weights(
        self, rule: Rule, number: int, at: Step, steps: Sequence[Step]
    ) -> Sequence[float | torch.Tensor]:
        """The predictor's weights, newest first; DiCache's are on the device."""
        if isinstance(rule.predictor, ProbeRatio) and len(steps) > 1:
            gate = next(d for d in self.deciders if d.number == number)
            if isinstance(gate, GateDecider) and gate.ratio is not None:
                return (gate.ratio, 1.0 - gate.ratio)
        return rule.predictor.weights(at, steps)

    def weights(self, unit: Unit, at: Step) -> tuple[float, ...]:
        """The predictor's weights over the unit's history, newest first."""
        predictor = self.recipe.rules[unit.rule].predictor
        return predictor.weights(at, [anchor.step for anchor in unit.history])

    def passed_through(self, index: int) -> Any:
        """The output of a skipped block inside a unit: fresh memory in the form of its streams.

        Nothing in it is ever read: what the model adds before the next block is lost on purpose,
        for the unit's payload holds it already. It is fresh because the model may write into it.
        """
        port = self._wired.ports[index]
        forms = {name: leaf_at(port.form, path) for name, path in port.outputs.items()}
        fresh = {
            name: torch.empty(form.shape, dtype=form.dtype, device=form.device)
            for name, form in forms.items()
            if form is not None
        }
        return port.build(fresh)

    def passes_alike(self, index: int) -> bool:
        """Whether block `index` passes through exactly what the block before it did."""
        ports = self._wired.ports
        if index not in self._alike:
            before = ports.get(index - 1)
            self._alike[index] = before is not None and (
                before.outputs == ports[index].outputs and before.form == ports[index].form
            )
        return self._alike[index]

    def built(self, index: int, values: Values) -> Any:
        """The output of the last skipped block of a unit."""
        return self._wired.ports[index].build(values)

    def drop(self) -> None:
        """Forget every payload."""
        for part in self.reusables:
            part.history.clear()
        for decider in self.deciders:
            decider.drop()
        self.latents = None

    def cache_bytes(self) -> int:
        """Bytes of the stored payloads and references."""
        held = [t for u in self.units for a in u.history for t in a.payload.values()]
        held += [t for decider in self.deciders for t in decider.tensors()]
        cells = sum(cell.cache_bytes() for cell in self.cells)
        return cells + sum(t.numel() * t.element_size() for t in held)
