"""The state of one branch of one run: histories, streaks, and who does what in a forward."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

from blockcache.engine.blocks import Blocks
from blockcache.engine.stats import BranchStats
from blockcache.engine.wiring import Wiring, bind, leaf_at
from blockcache.kernels.linear_combine import linear_combine
from blockcache.plan.policies import Gate
from blockcache.plan.recipe import Recipe, Rule
from blockcache.plan.sites import Layout
from blockcache.plan.steps import Step

Values = dict[str, torch.Tensor]


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

    def covers(self, index: int) -> bool:
        """Whether block `index` is part of the unit."""
        return self.first <= index <= self.last

    def contains(self, other: "Unit") -> bool:
        """Whether all of `other` is part of the unit."""
        return self.first <= other.first and other.last <= self.last

    def crosses(self, other: "Unit") -> bool:
        """Whether the two overlap and neither contains the other."""
        overlap = self.first <= other.last and other.first <= self.last
        return overlap and not self.contains(other) and not other.contains(self)


@dataclass(eq=False)
class Probe:
    """The blocks in front of a gated rule whose residual is the gate's signal.

    reference: the residual to compare with. change: the last comparison, (sum of differences, sum
    of magnitudes), still on the device.
    """

    rule: int
    first: int
    last: int
    reference: torch.Tensor | None = None
    change: torch.Tensor | None = None
    accumulated: float = 0.0


@dataclass(frozen=True)
class Role:
    """What happens at one block in one forward. The common case, nothing, is no role at all.

    enter, leave: computing units (and probes) that begin or end here. skip: the reused unit that
    covers the block.
    """

    enter: tuple[Unit | Probe, ...]
    leave: tuple[Unit | Probe, ...]
    skip: Unit | None


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
    units: list[Unit] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    is_layered: bool = False
    """Whether units overlap, so that one may be skipped while another one is due."""
    _roles: dict[frozenset[int], dict[int, Role]] = field(default_factory=dict)
    _skipped: dict[frozenset[int], frozenset[int]] = field(default_factory=dict)
    _alike: dict[int, bool] = field(default_factory=dict)

    def wire(self, wiring: Wiring) -> list[str]:
        """Lay the rules out on what was seen. Returns why a site had to be left out, if any."""
        self.wiring = wiring
        self.units, self.probes = [], []
        self._roles, self._skipped, self._alike = {}, {}, {}
        layout = Layout(wiring.chains, self.blocks.unet)
        refused: list[str] = []
        for number, rule in enumerate(self.recipe.rules):
            pieces = rule.site.units(layout)
            for row, (lo, hi) in enumerate(pieces):
                unit = self._unit(number, rule, row, len(pieces), lo, hi)
                why = "no block of the site is called" if unit is None else self._objection(unit)
                if unit is None or why:
                    refused.append(f"{rule.site.scope} {lo}..{hi}: {why}")
                    continue
                self.units.append(unit)
            if isinstance(rule.policy, Gate):
                self._add_probe(number, rule)
        self.is_layered = any(
            a.covers(b.first) or b.covers(a.first) for a, b in combinations(self.units, 2)
        )
        return refused

    def _unit(self, number: int, rule: Rule, row: int, rows: int, lo: int, hi: int) -> Unit | None:
        inside = [i for i in self._wired.called if lo <= i < hi]
        if not inside:
            return None
        history: deque[Anchor] = deque(maxlen=rule.predictor.depth)
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

    def _add_probe(self, number: int, rule: Rule) -> None:
        lo, _ = rule.site.limits(len(self.blocks))
        inside = [i for i in self._wired.called if i < lo]
        if inside:
            self.probes.append(Probe(number, inside[0], inside[-1]))

    @property
    def _wired(self) -> Wiring:
        if self.wiring is None:
            raise RuntimeError("the branch has not been watched yet")
        return self.wiring

    def compatible(self, wanted: set[int]) -> frozenset[int]:
        """Of overlapping units neither of which contains the other, only the earlier rule's."""
        kept: list[int] = []
        for number in sorted(wanted):
            unit = self.units[number]
            if not any(unit.crosses(self.units[other]) for other in kept):
                kept.append(number)
        return frozenset(kept)

    def roles(self, reused: frozenset[int]) -> dict[int, Role]:
        """Roles by block number when exactly the units numbered in `reused` are reused."""
        if reused not in self._roles:
            self._roles[reused] = self._make_roles([self.units[i] for i in sorted(reused)])
        return self._roles[reused]

    def skipped(self, reused: frozenset[int]) -> frozenset[int]:
        """The blocks that are skipped when exactly the units numbered in `reused` are reused."""
        roles = self.roles(reused)
        if reused not in self._skipped:
            self._skipped[reused] = frozenset(i for i, role in roles.items() if role.skip)
        return self._skipped[reused]

    def _make_roles(self, reused: Sequence[Unit]) -> dict[int, Role]:
        skipping = {i: self._outermost(i, reused) for i in self._wired.called}
        active: list[Unit | Probe] = [u for u in self.units if self._is_active(u, reused)]
        active += [p for p in self.probes if not any(u.covers(p.first) for u in reused)]
        roles = {}
        for i in self._wired.called:
            enter = tuple(u for u in active if u.first == i)
            leave = tuple(u for u in active if u.last == i)
            if enter or leave or skipping[i]:
                roles[i] = Role(enter, leave, skipping[i])
        return roles

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
        weights = self.weights(unit, at)
        anchors = [unit.history[j].payload for j in range(len(weights))]
        values = {}
        for name, newest in anchors[0].items():
            base = entered.get(name)
            form = leaf_at(port.form, port.outputs[name]) if name in port.outputs else None
            add = base is not None and form is not None and self._is_residual(unit, base, form)
            history = [anchor.get(name, newest) for anchor in anchors]
            values[name] = linear_combine(history, weights, base if add else None)
        return values

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
        for unit in self.units:
            unit.history.clear()
        for probe in self.probes:
            probe.reference = probe.change = None

    def cache_bytes(self) -> int:
        """Bytes of the stored payloads and references."""
        held = [t for u in self.units for a in u.history for t in a.payload.values()]
        held += [p.reference for p in self.probes if p.reference is not None]
        return sum(t.numel() * t.element_size() for t in held)
