"""Online rules: what they measure in one branch, and how they decide from it.

A decider speaks up to three times in a forward: `before` the first block, when its blocks are
`passed`, and when the denoiser is `finished`. The first branch of a step decides for the others
unless the recipe says "independent"; its verdict is kept by the run. Whatever is read from the
device is read in one go.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from blockcache.engine import signals
from blockcache.engine.groups import summed
from blockcache.engine.wiring import Values
from blockcache.kernels.linear_combine import linear_combine
from blockcache.plan.forecasts import ProbeRatio
from blockcache.plan.policies import Codebook, Gate, Ranked, Verified
from blockcache.plan.recipe import Rule
from blockcache.plan.steps import Step

if TYPE_CHECKING:
    from blockcache.engine.branch import Branch, Unit
    from blockcache.engine.parts import Cell
    from blockcache.engine.run import Forward, Run


@dataclass(frozen=True)
class Verdict:
    """What a rule's first branch decided in a step.

    asked: what asks for computing, empty to reuse. rows: of a decision per sample, which samples
    are computed. units: rows of the rule's units that are computed, where it is not all.
    """

    asked: str
    rows: tuple[bool, ...] = ()
    units: frozenset[int] = frozenset()


class Decider:
    """Base class: one online rule in one branch.

    number: of the rule. first, last: the blocks whose passing is looked at; none if first > last.
    at_entry: looked at when entering `first`, else when leaving `last`.
    """

    def __init__(self, number: int, rule: Rule, first: int = 0, last: int = -1) -> None:
        """Start without any measurement."""
        self.number, self.rule = number, rule
        self.first, self.last = first, last
        self.at_entry = False
        self.needs_input = True
        """Whether what enters `first` has to be copied for it."""
        self.change: torch.Tensor | None = None
        """The last comparison, sums `[samples, n]`, still on the device."""

    def before(self, run: "Run", branch: "Branch", step: Step) -> Verdict | None:
        """The decision before the first block; None leaves it open and computes until then.

        That of the step's first branch where there is one to follow, else an own one.
        """
        if self.follows(run) and self._has_history(branch):
            return run.verdicts[self.number]
        verdict = run.verdicts[self.number] = self.decide(run, branch, step)
        return verdict

    def decide(self, run: "Run", branch: "Branch", step: Step) -> Verdict:
        """The first branch's decision before the first block."""
        raise NotImplementedError

    def passed(
        self, run: "Run", forward: "Forward", entered: Values, output: Any
    ) -> Verdict | None:
        """Its blocks are done (or entered): measure, and decide if that is what decides."""
        return None

    def finished(self, run: "Run", forward: "Forward", output: Any) -> None:
        """The denoiser is done."""

    def drop(self) -> None:
        """Forget every tensor."""
        self.change = None

    def tensors(self) -> list[torch.Tensor]:
        """What is held for the steps to come."""
        return []

    def follows(self, run: "Run") -> bool:
        """Whether an earlier branch of this step has decided."""
        return run.recipe.branches != "independent" and self.number in run.verdicts

    def _reusables(self, branch: "Branch") -> "list[Unit | Cell]":
        return branch.of_rule(self.number)

    def _has_history(self, branch: "Branch", depth: int = 1) -> bool:
        return all(len(unit.history) >= depth for unit in self._reusables(branch))

    def _forced(self, branch: "Branch", step: Step) -> str:
        return self.rule.forced(step, self._streak(branch))

    def _due(self, branch: "Branch", step: Step) -> str:
        """What asks for computing whatever is measured."""
        return self._forced(branch, step) or ("" if self._has_history(branch) else "no history")

    def _streak(self, branch: "Branch") -> int:
        """Steps since all of the rule was computed."""
        return max(part.streak for part in self._reusables(branch))


@dataclass
class _Sample:
    """What a gate remembers of one sample: changes added up and steps since it was computed."""

    accumulated: float = 0.0
    streak: int = 0

    def advance(self, change: float, is_computed: bool) -> None:
        """One step on."""
        self.accumulated = 0.0 if is_computed else self.accumulated + change
        self.streak = 0 if is_computed else self.streak + 1


class GateDecider(Decider):
    """A `Gate` that looks at blocks in front of its site, or at what enters it."""

    def __init__(self, number: int, rule: Rule, gate: Gate, first: int, last: int) -> None:
        """Look at the blocks first..last."""
        super().__init__(number, rule, first, last)
        self.gate = gate
        self.at_entry = not gate.needs_probe
        self.needs_input = gate.signal == "first_block" or isinstance(rule.predictor, ProbeRatio)
        self.reference: torch.Tensor | None = None
        self.residuals: deque[torch.Tensor] = deque(maxlen=2)
        """Of the probe at the computed steps, newest first, where the predictor wants them."""
        self.ratio: torch.Tensor | None = None
        self._samples: list[_Sample] = []

    def before(self, run: "Run", branch: "Branch", step: Step) -> Verdict | None:
        """What the first branch decided, if this one can follow."""
        verdict = run.verdicts.get(self.number) if self.follows(run) else None
        can_follow = self._has_history(branch) and not self._forced(branch, step)
        if verdict is None or verdict.asked or not can_follow:
            return None
        return verdict

    def passed(
        self, run: "Run", forward: "Forward", entered: Values, output: Any
    ) -> Verdict | None:
        """Compare with the reference and decide."""
        current = self._signal(run, forward, entered, output)
        residual = self._residual(forward, entered, output)
        self.change = self._compared(current, self.reference)
        self.ratio = self._ratio(run, residual)
        if self.follows(run):
            verdict = self._following(run, forward)
        else:
            verdict = self._decided(run, forward.branch, forward.step)
            run.verdicts[self.number] = verdict
        self._renew(verdict, current, residual)
        return verdict

    def look(self, run: "Run", forward: "Forward", entered: Values, output: Any) -> None:
        """Measure in a forward that is computed in any case."""
        current = self._signal(run, forward, entered, output)
        self._samples = []
        self._renew(Verdict("computed"), current, self._residual(forward, entered, output))

    def drop(self) -> None:
        """Forget the reference."""
        super().drop()
        self.reference = self.ratio = None
        self.residuals.clear()
        self._samples = []

    def tensors(self) -> list[torch.Tensor]:
        """The reference and the probe's residuals."""
        return [t for t in (self.reference, *self.residuals) if t is not None]

    def _signal(
        self, run: "Run", forward: "Forward", entered: Values, output: Any
    ) -> torch.Tensor | None:
        branch = forward.branch
        if self.gate.signal == "first_block":
            return signals.residual(branch, self.last, entered, output)
        if self.gate.signal == "probe":
            return signals.left(branch, self.last, output)
        block = branch.blocks.blocks[self.first]
        main = branch.main_stream(self.first)
        seen = signals.modulated(block, main, forward.bound)
        if self.gate.signal == "modulated":
            return seen
        if seen is None or seen.shape[:-1] != forward.bound[main].shape[:-1]:
            # Blocks that modulate inside themselves: the tokens as they enter.
            seen = forward.bound[main]
        # Flow matching's timestep is its noise level.
        is_flow = abs(run.steps[0].sigma - run.steps[0].noise_time) < 0.01
        return signals.filtered(seen, branch.arrangement, forward.step, is_flow, self.gate.falloff)

    def _residual(self, forward: "Forward", entered: Values, output: Any) -> torch.Tensor | None:
        if not isinstance(self.rule.predictor, ProbeRatio):
            return None
        return signals.residual(forward.branch, self.last, entered, output)

    def _compared(
        self, current: torch.Tensor | None, reference: torch.Tensor | None
    ) -> torch.Tensor | None:
        if current is None or reference is None or current.shape != reference.shape:
            return None
        return signals.sums(current, reference, per_sample=self.gate.batch != "mean")

    def _ratio(self, run: "Run", residual: torch.Tensor | None) -> torch.Tensor | None:
        predictor = self.rule.predictor
        if residual is None or len(self.residuals) < 2 or not isinstance(predictor, ProbeRatio):
            return None
        newest, older = self.residuals
        distances = (residual - older, newest - older)
        sums = torch.stack([d.abs().sum(dtype=torch.float32) for d in distances])
        moved, apart = summed(sums, run.group)
        ratio: torch.Tensor = (moved / apart).nan_to_num(1.0)
        return ratio.clamp(predictor.least, predictor.most)

    def _following(self, run: "Run", forward: "Forward") -> Verdict:
        own = forward.branch.numbers_of(self.number)
        is_partly = any(forward.branch.units[number] in forward.partly for number in own)
        if own <= forward.reused or is_partly:
            return run.verdicts[self.number]
        return Verdict("first branch")

    def _decided(self, run: "Run", branch: "Branch", step: Step) -> Verdict:
        """The one host read of the step."""
        changes = self._changes(run, branch)
        if len(self._samples) != len(changes):
            self._samples = [_Sample() for _ in changes]
        verdict = self._verdict(branch, step, changes)
        computed = verdict.rows or (bool(verdict.asked),) * len(changes)
        for sample, change, is_computed in zip(self._samples, changes, computed, strict=True):
            sample.advance(change, is_computed)
        return verdict

    def _verdict(self, branch: "Branch", step: Step, changes: Sequence[float]) -> Verdict:
        asked = self._forced(branch, step)
        if not asked and (self.change is None or not self._has_history(branch)):
            asked = "no history"
        if asked:
            return Verdict(asked)
        reasons = [
            "threshold"
            if self.gate.should_compute(change, sample.accumulated)
            else self.rule.forced(step, sample.streak)
            for change, sample in zip(changes, self._samples, strict=True)
        ]
        if self.gate.batch == "sample" and any(reasons) and not all(reasons):
            return Verdict("", tuple(map(bool, reasons)))
        return Verdict(next(filter(None, reasons), ""))

    def _changes(self, run: "Run", branch: "Branch") -> list[float]:
        """The change of each sample. Joint branches count the others' of the step before, too."""
        if self.change is None:
            return []
        others: list[Decider] = []
        if run.recipe.branches == "joint" and self.gate.batch != "sample":
            others = [d for b in run.branches if b is not branch for d in b.deciders]
        known = [d.change for d in others if d.number == self.number and d.change is not None]
        together = summed(torch.cat([self.change, *known]), run.group)
        own = len(self.change)
        branch.stats.changes.append(self.pair(together[:own]))
        values = [self.value(row) for row in together.tolist()]
        return [_largest([value, *values[own:]]) for value in values[:own]]

    def pair(self, sums: torch.Tensor) -> torch.Tensor:
        """(difference, magnitude) over all samples, for the statistics."""
        return sums[:, :2].sum(0)

    def value(self, row: Sequence[float]) -> float:
        """The rescaled change of one sample from its sums."""
        difference, magnitude = row[0], row[1]
        change = difference / magnitude if magnitude > 0 else float("nan")
        return self.gate.rescaled(change)

    def _renew(
        self, verdict: Verdict, current: torch.Tensor | None, residual: torch.Tensor | None
    ) -> None:
        if verdict.asked:
            # Measured against the old reference, it says nothing about the steps to come.
            self.change = None
            if residual is not None:
                self.residuals.appendleft(residual)
        if verdict.asked or self.gate.reference == "previous" or self.reference is None:
            self.reference = current
        elif verdict.rows and current is not None:
            self.reference = signals.chosen_rows(current, self.reference, verdict.rows)


class LatentDecider(GateDecider):
    """The gate in front of the whole denoiser: latents in, output out (EasyCache)."""

    def __init__(self, number: int, rule: Rule, gate: Gate) -> None:
        """Look at no block."""
        super().__init__(number, rule, gate, 0, -1)
        self._previous: torch.Tensor | None = None
        self._computed: tuple[torch.Tensor, torch.Tensor] | None = None
        self._gain: tuple[torch.Tensor, ...] | None = None
        """Sizes of the output's change, of the latents' change and of the output."""
        self._is_split = False

    def before(self, run: "Run", branch: "Branch", step: Step) -> Verdict | None:
        """Decide from the latents alone."""
        self.change = None
        latents, previous = branch.latents, self._previous
        if latents is not None and previous is not None and self._gain is not None:
            self.change = torch.stack([*self._gain, self._sizes(latents - previous)], dim=1)
        if self.follows(run):
            verdict = run.verdicts[self.number]
            has_what_it_takes = self._has_history(branch) and not self._forced(branch, step)
            return verdict if has_what_it_takes else Verdict("no history")
        run.verdicts[self.number] = self._decided(run, branch, step)
        return run.verdicts[self.number]

    def value(self, row: Sequence[float]) -> float:
        """Gain times the latents' change, over the size of the last computed output."""
        output_change, latent_change, size, moved = row
        if latent_change <= 0 or size <= 0:
            return float("nan")
        return self.gate.rescaled(output_change / latent_change * moved / size)

    def pair(self, sums: torch.Tensor) -> torch.Tensor:
        """(estimated change, size) of the output."""
        output_change, latent_change, size, moved = sums.sum(0).unbind()
        return torch.stack([output_change / latent_change * moved, size])

    def finished(self, run: "Run", forward: "Forward", output: Any) -> None:
        """Keep the latents, and of computed steps the output and the gain."""
        result, latents = signals.stacked(output), forward.latents
        if result is None or latents is None:
            return
        self._is_split = self.gate.batch != "mean" and len(result) == len(latents)
        if not forward.is_whole:
            if self._computed is not None:
                before, old = self._computed
                tensors = (result - old, latents - before, result)
                self._gain = tuple(self._sizes(t) for t in tensors)
            self._computed = (latents, result)
        self._previous = latents

    def _sizes(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of magnitudes of each sample, or of all as one."""
        rows = len(tensor) if self._is_split else 1
        return tensor.abs().float().reshape(rows, -1).sum(1)

    def drop(self) -> None:
        """Forget latents and outputs."""
        super().drop()
        self._previous = self._computed = self._gain = None

    def tensors(self) -> list[torch.Tensor]:
        """Latents and outputs."""
        latents, output = self._computed or (None, None)
        held = (latents, output, None if self._previous is latents else self._previous)
        return [t for t in held if t is not None]


class RankedDecider(Decider):
    """Ranks the units after every full step (Sortblock)."""

    def __init__(self, number: int, rule: Rule, policy: Ranked) -> None:
        """Nothing chosen yet."""
        super().__init__(number, rule)
        self.policy = policy
        self._chosen: frozenset[int] | None = None

    def decide(self, run: "Run", branch: "Branch", step: Step) -> Verdict:
        """Full, or the chosen units."""
        asked = self._forced(branch, step)
        if asked or self.policy.is_full(step) or not self._has_history(branch, 2):
            self._chosen = None
            return Verdict(asked or "full step")
        if self._chosen is None:
            self._chosen = self._ranked(run, branch, step)
        return Verdict("", units=self._chosen)

    def _ranked(self, run: "Run", branch: "Branch", step: Step) -> frozenset[int]:
        """Lists of blocks (two-stream, one-stream) are ranked for themselves."""
        units = [unit for unit in branch.units if unit.rule == self.number]
        similarities = self._similarities(run, units)
        groups: dict[str, list[Unit]] = {}
        for unit in units:
            groups.setdefault(branch.group_of(unit), []).append(unit)
        chosen: set[int] = set()
        for members in groups.values():
            picked = self.policy.chosen(step, [similarities[unit.row] for unit in members])
            chosen |= {members[i].row for i in picked}
        return frozenset(chosen)

    @staticmethod
    def _similarities(run: "Run", units: "Sequence[Unit]") -> dict[int, float]:
        """Cosine similarity of the last two payloads, by row of the unit."""
        sums = [signals.token_sums(unit) for unit in units]
        # Of ranks that split the tokens, sums can be added up; their cosines could not.
        together = summed(torch.cat(sums, dim=1), run.group)
        dots = [
            torch.stack([(new * old).sum(), (new * new).sum(), (old * old).sum()])
            for new, old in together.split([s.shape[1] for s in sums], dim=1)
        ]
        return {
            unit.row: no / (nn * oo) ** 0.5 if nn * oo > 0 else 0.0
            for unit, (no, nn, oo) in zip(units, torch.stack(dots).tolist(), strict=True)
        }

    def drop(self) -> None:
        """Forget the ranking."""
        super().drop()
        self._chosen = None


class CodebookDecider(Decider):
    """Looks at one block at the computed steps and sets the date of the next one (AdaCache)."""

    def __init__(self, number: int, rule: Rule, policy: Codebook, block: int) -> None:
        """Look at `block`."""
        super().__init__(number, rule, block, block)
        self.policy = policy
        self._reference: torch.Tensor | None = None
        self._at = self._before = 0
        self._date = 0

    def decide(self, run: "Run", branch: "Branch", step: Step) -> Verdict:
        """Reuse until the date."""
        if self.change is not None:
            self._date = self._at + self._interval(run, branch, self.change)
            self.change = None
        is_over = step.index >= self._date
        return Verdict(self._due(branch, step) or ("interval" if is_over else ""))

    def _interval(self, run: "Run", branch: "Branch", change: torch.Tensor) -> int:
        difference, magnitude = summed(change, run.group)[0]
        per_step = torch.stack([difference / (self._at - self._before), magnitude])
        branch.stats.changes.append(per_step)
        difference, magnitude = per_step.tolist()
        return self.policy.interval(difference / magnitude if magnitude > 0 else float("inf"))

    def passed(
        self, run: "Run", forward: "Forward", entered: Values, output: Any
    ) -> Verdict | None:
        """Measure at the computed steps; the decision is for the steps to come."""
        if forward.branch.numbers_of(self.number) & forward.reused:
            return None
        current = signals.residual(forward.branch, self.last, entered, output)
        if self._reference is not None and forward.step.index > self._at:
            self.change = signals.sums(current, self._reference, per_sample=False)
            self._before, self._at = self._at, forward.step.index
        self._reference = current
        return None

    def drop(self) -> None:
        """Forget the reference."""
        super().drop()
        self._reference = None
        self._date = 0

    def tensors(self) -> list[torch.Tensor]:
        """The block's residual."""
        return [] if self._reference is None else [self._reference]


class VerifiedDecider(Decider):
    """Trusts the forecast and checks it at the last block (SpeCa)."""

    def __init__(self, number: int, rule: Rule, policy: Verified, block: int) -> None:
        """Check at `block`, the one behind the site."""
        super().__init__(number, rule, block, block)
        self.policy = policy
        self.needs_input = False
        self._is_leading = False
        self._history: deque[tuple[Step, torch.Tensor]] = deque(maxlen=rule.predictor.depth)

    def before(self, run: "Run", branch: "Branch", step: Step) -> Verdict | None:
        """As the first branch, or an own decision, which is checked at the last block."""
        self._is_leading = False
        return super().before(run, branch, step)

    def decide(self, run: "Run", branch: "Branch", step: Step) -> Verdict:
        """Reuse for now."""
        self._is_leading = True
        is_long = self._streak(branch) >= self.policy.most
        return Verdict(self._due(branch, step) or ("longest streak" if is_long else ""))

    def passed(
        self, run: "Run", forward: "Forward", entered: Values, output: Any
    ) -> Verdict | None:
        """Compare the block's output with its forecast, or keep it for later forecasts."""
        branch, step = forward.branch, forward.step
        current = signals.left(branch, self.last, output)
        if not branch.numbers_of(self.number) & forward.reused:
            self._history.appendleft((step, current))
            return None
        is_due = self._is_leading and self._streak(branch) >= self.policy.least
        if not is_due or not self._history:
            return None
        error = self._error(run, branch, step, current)
        if not error < self.policy.limit(step):
            forward.is_rejected = True
            run.verdicts[self.number] = Verdict("forecast rejected")
        return None

    def _error(self, run: "Run", branch: "Branch", step: Step, current: torch.Tensor) -> float:
        weights = self.rule.predictor.weights(step, [at for at, _ in self._history])
        payloads = [payload for _, payload in self._history][: len(weights)]
        forecast = linear_combine(payloads, weights).float()
        relative = (current.float() - forecast).abs() / (forecast.abs() + 1e-6)
        count = relative.new_full((), relative.numel())
        sums = summed(torch.stack([relative.sum(), count]), run.group)
        branch.stats.changes.append(sums)
        total, elements = sums.tolist()
        return float(total / elements)

    def drop(self) -> None:
        """Forget the outputs."""
        super().drop()
        self._history.clear()

    def tensors(self) -> list[torch.Tensor]:
        """The block's outputs."""
        return [payload for _, payload in self._history]


def _largest(values: Sequence[float]) -> float:
    """The largest value; NaN if one is."""
    return max(values) if all(value == value for value in values) else float("nan")


def block_of_codebook(policy: Codebook, called: Sequence[int]) -> int:
    """The block it looks at, of those that are called."""
    return called[min(int(policy.block * len(called)), len(called) - 1)]


def decider_for(number: int, rule: Rule, branch: "Branch") -> Decider | None:
    """The decider of a rule, or None: it is static, or its blocks are not called here."""
    policy = rule.policy
    called = branch.called
    lo, hi = rule.site.limits(len(branch.blocks))
    inside = [i for i in called if lo <= i < hi]
    if isinstance(policy, Gate) and rule.site.scope == "model":
        return LatentDecider(number, rule, policy)
    if not called:
        return None
    if isinstance(policy, Gate):
        before = [i for i in called if i < lo]
        watched = before if policy.needs_probe else inside[:1]
        return GateDecider(number, rule, policy, watched[0], watched[-1]) if watched else None
    if isinstance(policy, Ranked):
        return RankedDecider(number, rule, policy)
    if isinstance(policy, Codebook):
        return CodebookDecider(number, rule, policy, block_of_codebook(policy, called))
    if isinstance(policy, Verified):
        behind = [i for i in called if i >= hi]
        return VerifiedDecider(number, rule, policy, behind[-1]) if behind else None
    return None
