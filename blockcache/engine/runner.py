"""The runner: owns all mutable state, and is what the hooks call.

State belongs to (thread, run, branch, site). A run begins when the tracker says so and drops
everything of the run before, however that ended; so nothing leaks between runs, branches, threads
or exceptions. Whatever is not understood is computed, counted and said once.
"""

import logging
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from blockcache.engine import signals
from blockcache.engine.blocks import Blocks
from blockcache.engine.branch import Anchor, Branch, Probe, Role, Unit, Values
from blockcache.engine.hooks import Call
from blockcache.engine.stats import BranchStats, RunStats
from blockcache.engine.tracker import BranchNames, Tracker, conditioning_of, scheduler_of_caller
from blockcache.engine.wiring import Watch, Wiring
from blockcache.plan.policies import Gate, MaskTable
from blockcache.plan.recipe import Recipe, Schedule
from blockcache.plan.steps import Step

logger = logging.getLogger("blockcache")

COMPILED_WHOLE = (
    "the whole model is compiled, so its blocks are not called and nothing is reused; "
    "compile the blocks instead (compile_repeated_blocks)"
)
_FEW_STEPS = 8
_MOST_CALLS = 16
"""Denoiser calls in one step beyond which the step is not believed."""


@dataclass
class Run:
    """One run in one thread."""

    steps: tuple[Step, ...]
    stats: RunStats
    branches: list[Branch] = field(default_factory=list)
    names: BranchNames = field(default_factory=BranchNames)
    step: int = -1
    calls: int = 0
    calls_before: int = 0
    gated: dict[int, bool] = field(default_factory=dict)
    """Gated rule to whether this step's first branch computes it."""
    adapter: Any = None
    objection: str = ""
    """Why the whole run is computed plainly."""
    schedules: dict[tuple[int, int], Schedule | None] = field(default_factory=dict)


@dataclass
class Forward:
    """One denoiser call under way."""

    step: Step
    branch: Branch
    watch: Watch | None = None
    reused: frozenset[int] = frozenset()
    roles: dict[int, Role] = field(default_factory=dict)
    inputs: dict[Unit | Probe, Values] = field(default_factory=dict)
    open: dict[Unit, Values] = field(default_factory=dict)
    edges: dict[int, tuple[Values, Any]] = field(default_factory=dict)
    """While watching: copies of what entered and left the blocks where units may begin or end."""
    passed: Any = None
    """What the last skipped block inside a unit put out."""
    called: list[int] = field(default_factory=list)


class Runner:
    """Serves one denoiser."""

    def __init__(
        self, denoiser: nn.Module, blocks: Blocks, recipe: Recipe, scheduler: Any = None
    ) -> None:
        """Nothing is allocated before the first forward.

        scheduler: used where no pipeline is found on the call stack.
        """
        self.denoiser, self.blocks, self.recipe = denoiser, blocks, recipe
        self.last_run: RunStats | None = None
        self._scheduler = scheduler
        self._names = signals.argument_names(denoiser)
        self._edges = _edges(blocks, recipe)
        self.siblings: list[Runner] = []
        """The runners of the pipeline's other denoisers."""
        self._local = threading.local()
        self._said: set[str] = set()
        self._runs = 0

    # ---- called by the hooks -------------------------------------------------------------------

    def forward(self, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the denoiser."""
        forward = self._local.forward = self._begin(args, kwargs)
        try:
            output = inner(*args, **kwargs)
        except BaseException:
            # What was stored so far may be of mixed steps.
            self._abandon()
            raise
        self._local.forward = None
        if forward is not None and not self._end(forward):
            return inner(*args, **kwargs)
        return output

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Forward | None":
        """Find out where we are and decide what can be decided before the first block."""
        scheduler = self._scheduler or scheduler_of_caller(self.denoiser)
        objection = self._objection(scheduler)
        if objection:
            self._bypass(objection)
            return None
        named = dict(zip(self._names, args, strict=False)) | kwargs
        moment = self._tracker.locate(scheduler, named.get("timestep", named.get("t")))
        run: Run = self._start_run() if moment.is_new_run else self._local.run
        if run.objection:
            self._bypass(run.objection)
            return None
        if moment.call >= _MOST_CALLS:
            self._bypass("the scheduler stays at one step; give the scheduler that really steps")
            self._release(run)
            return None
        self._enter_step(run, moment.step)
        return self._forward(run, moment.step, moment.call, named)

    def block(self, index: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of block `index`."""
        forward: Forward | None = getattr(self._local, "forward", None)
        if forward is None:
            return inner(*args, **kwargs)
        forward.called.append(index)
        if forward.watch is not None:
            return self._watched(forward, index, inner, args, kwargs)
        role = forward.roles.get(index)
        if role is None:
            return inner(*args, **kwargs)
        if role.enter:
            entered = forward.branch.inputs(index, args, kwargs)
            for part in role.enter:
                # Copies, for a block may write into its input.
                forward.inputs[part] = {name: x.clone() for name, x in entered.items()}
        if role.skip is not None:
            output = self._skip(forward, role.skip, index, inner, args, kwargs)
        else:
            output = inner(*args, **kwargs)
        for part in role.leave:
            if isinstance(part, Probe):
                self._decide_gate(forward, part, output)
            else:
                self._store(forward, part, output)
        return output

    def _end(self, forward: Forward) -> bool:
        """Take stock of a finished forward. False if its output cannot be trusted."""
        if forward.watch is not None:
            self._finish_watch(forward)
        elif forward.branch.wiring is None or tuple(forward.called) != forward.branch.wiring.called:
            # The model did not call the blocks it called before: what is stored has no use.
            self._drop(self._local.run, "the model did not call the same blocks as before")
            forward.branch.wiring = None
            return not forward.reused
        self._account(forward)
        return True

    def _objection(self, scheduler: Any) -> str:
        """Why this call had better be left alone, or an empty string."""
        if torch.is_grad_enabled():
            return "gradients are enabled; wrap the call in torch.no_grad()"
        if getattr(self.denoiser, "is_cache_enabled", False):
            return "diffusers' own cache was enabled on the model; call disable_cache()"
        if getattr(scheduler, "timesteps", None) is None:
            return "no scheduler is in sight; pass enable(..., scheduler=...)"
        return ""

    # ---- runs, steps, branches -----------------------------------------------------------------

    @property
    def _tracker(self) -> Tracker:
        if not hasattr(self._local, "tracker"):
            self._local.tracker = Tracker()
        tracker: Tracker = self._local.tracker
        return tracker

    def _start_run(self) -> Run:
        previous: Run | None = getattr(self._local, "run", None)
        if previous is not None:
            self._finish(previous)
        for sibling in self.siblings:
            sibling.hand_over(self._tracker)
        self._runs += 1
        run = Run(self._tracker.steps, RunStats(self._runs))
        run.adapter = signals.adapter_state(self.denoiser)
        if any(rule.site.scope != "stack" for rule in self.recipe.rules):
            run.objection = signals.offloading_objection(self.blocks)
        self._local.run = run
        self.last_run = run.stats
        self._remark_on_steps(run)
        return run

    def _remark_on_steps(self, run: Run) -> None:
        total = len(run.steps)
        if self._tracker.scheduled < _FEW_STEPS:
            self.say(f"a run of {total} steps leaves little to reuse; expect loss without gain")
        for rule in self.recipe.rules:
            if isinstance(rule.policy, MaskTable) and not rule.policy.fits(run.steps):
                how = "noise level" if rule.policy.sigmas else "share of the run"
                self.say(
                    f"the plan was made for {rule.policy.total} steps and is applied to {total} "
                    f"by {how}; its measured figures do not hold here"
                )

    def _enter_step(self, run: Run, step: Step) -> None:
        if step.index == run.step:
            run.calls += 1
            return
        run.step, run.calls_before, run.calls = step.index, run.calls, 1
        run.gated.clear()
        adapter = signals.adapter_state(self.denoiser)
        if adapter != run.adapter:
            run.adapter = adapter
            self._drop(run, "the adapter or its scale changed within the run")

    def _forward(self, run: Run, step: Step, call: int, named: dict[str, Any]) -> Forward:
        form = signals.form_of(named)
        number = run.names.number(call, conditioning_of(named, self._names), form)
        if number == len(run.branches):
            stats = BranchStats(str(number), len(self.blocks))
            run.stats.branches.append(stats)
            self._retire(run, form, step)
            run.branches.append(Branch(self.recipe, self.blocks, stats))
        branch = run.branches[number]
        branch.form, branch.step = form, step.index
        if branch.wiring is None:
            return Forward(step, branch, Watch(self.blocks))
        reused = self._choose(run, branch, step)
        return Forward(step, branch, None, reused, branch.roles(reused))

    @staticmethod
    def _retire(run: Run, form: Any, step: Step) -> None:
        """Another size is another stage: branches of the old size will not be called again."""
        for branch in run.branches:
            is_current = branch.step == step.index
            if not is_current and signals.sizes(branch.form) != signals.sizes(form):
                branch.drop()

    # ---- deciding ------------------------------------------------------------------------------

    def _choose(self, run: Run, branch: Branch, step: Step) -> frozenset[int]:
        """The units to be reused, as far as that is known before the first block."""
        reused = set()
        for number, unit in enumerate(branch.units):
            if isinstance(self.recipe.rules[unit.rule].policy, Gate):
                if self._gate_is_open(run, unit, step):
                    reused.add(number)
                continue
            asked = self._schedule(run, unit)[unit.row][step.index]
            if not asked and not unit.history:
                asked = "no history"
            branch.stats.decided[asked or "reuse"] += 1
            if not asked:
                reused.add(number)
        return branch.compatible(reused)

    def _schedule(self, run: Run, unit: Unit) -> Schedule:
        key = (unit.rule, unit.rows)
        if key not in run.schedules:
            run.schedules[key] = self.recipe.rules[unit.rule].schedule(run.steps, unit.rows)
        schedule = run.schedules[key]
        if schedule is None:
            raise RuntimeError("an online rule has no schedule")
        return schedule

    def _follows(self, run: Run, rule: int) -> bool:
        """Whether an earlier branch of this step has decided for this one."""
        return self.recipe.branches != "independent" and rule in run.gated

    def _gate_is_open(self, run: Run, unit: Unit, step: Step) -> bool:
        follows = self._follows(run, unit.rule) and not run.gated[unit.rule]
        return follows and bool(unit.history) and not self._forced(unit, step)

    def _forced(self, unit: Unit, step: Step) -> str:
        return self.recipe.rules[unit.rule].forced(step, unit.streak)

    def _decide_gate(self, forward: Forward, probe: Probe, output: Any) -> None:
        """The probe's blocks are done: measure their change and decide for the rule behind them."""
        run: Run = self._local.run
        branch, gate = forward.branch, self.recipe.rules[probe.rule].policy
        units = {i: u for i, u in enumerate(branch.units) if u.rule == probe.rule}
        entered = forward.inputs.pop(probe, None)
        if not isinstance(gate, Gate) or not units or entered is None:
            return
        current = signals.probe_residual(branch, probe, entered, output)
        probe.change = signals.change_of(current, probe.reference)
        if self._follows(run, probe.rule):
            asked = "" if units.keys() <= forward.reused else "first branch"
        else:
            asked = self._gate_asks(run, branch, gate, probe, forward.step)
            run.gated[probe.rule] = bool(asked)
        branch.stats.decided[asked or "reuse"] += 1
        if asked:
            # Measured against the old reference, it says nothing about the steps to come.
            probe.change = None
        if asked or gate.reference == "previous":
            probe.reference = current
        if not asked:
            forward.reused = branch.compatible({*forward.reused, *units})
            forward.roles = branch.roles(forward.reused)

    def _gate_asks(self, run: Run, branch: Branch, gate: Gate, probe: Probe, step: Step) -> str:
        """What asks for computing behind a probe; empty to reuse."""
        units = [u for u in branch.units if u.rule == probe.rule]
        others: list[Probe] = []
        if self.recipe.branches == "joint":
            # Their changes are of the step before: this step's are not known yet.
            others = [p for b in run.branches if b is not branch for p in b.probes]
        known = [
            p.change for p in (probe, *others) if p.rule == probe.rule and p.change is not None
        ]
        change = max(signals.read_changes(known), default=float("nan"))
        branch.stats.changes += known[:1]
        asked = self._forced(units[0], step)
        if not asked and (probe.change is None or any(not unit.history for unit in units)):
            asked = "no history"
        if not asked and gate.should_compute(change, probe.accumulated):
            asked = "threshold"
        probe.accumulated = 0.0 if asked else probe.accumulated + change
        return asked

    # ---- doing ---------------------------------------------------------------------------------

    def _skip(
        self,
        forward: Forward,
        unit: Unit,
        index: int,
        inner: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        branch = forward.branch
        if index == unit.first:
            entered = branch.inputs(index, args, kwargs)
            # Predicted at once: the model may write into what is passed through behind it.
            forward.open[unit] = branch.predict(unit, forward.step, entered)
        elif unit not in forward.open:
            # The model left out the first block this time; `end` will see to that.
            return inner(*args, **kwargs)
        elif index != unit.last and branch.passes_alike(index):
            return forward.passed
        if index == unit.last:
            return branch.built(index, forward.open.pop(unit))
        forward.passed = branch.passed_through(index)
        return forward.passed

    def _store(self, forward: Forward, unit: Unit, output: Any) -> None:
        entered = forward.inputs.pop(unit, None)
        if entered is None or not self._is_needed(forward.branch, unit, forward.step):
            return
        run: Run = self._local.run
        branch = forward.branch
        payload = branch.payload(unit, entered, output)
        if not payload:
            return
        if unit.row == 0 and unit.history:
            signals.note_drift(branch, unit, forward.step, payload)
        unit.history.appendleft(Anchor(forward.step, payload))
        held = sum(b.cache_bytes() for b in run.branches)
        run.stats.cache_bytes = max(run.stats.cache_bytes, held)

    def _is_needed(self, branch: Branch, unit: Unit, step: Step) -> bool:
        """Whether a later reused step may look back on this one."""
        run: Run = self._local.run
        rule = self.recipe.rules[unit.rule]
        if isinstance(rule.policy, Gate) or branch.is_layered:
            return step.index < len(run.steps) - 1
        computed_since = 0
        for asked in self._schedule(run, unit)[unit.row][step.index + 1 :]:
            if not asked:
                return True
            computed_since += 1
            if computed_since >= rule.predictor.depth:
                return False
        return False

    def _watched(
        self,
        forward: Forward,
        index: int,
        inner: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A block of a branch's first forward: computed, watched, and copied at the edges."""
        watch = forward.watch
        if watch is None:
            raise RuntimeError("not watching")
        bound = watch.before(index, args, kwargs)
        starts, ends = self._edges
        entered = {}
        if index in starts:
            entered = {k: v.clone() for k, v in bound.items() if isinstance(v, torch.Tensor)}
        output = inner(*args, **kwargs)
        watch.after(output)
        if index in starts or index in ends:
            forward.edges[index] = (entered, signals.copied(output) if index in ends else None)
        return output

    def _finish_watch(self, forward: Forward) -> None:
        branch = forward.branch
        if forward.watch is None or not forward.called:
            branch.wiring = Wiring({}, (), (len(self.blocks),), frozenset())
            self.say(COMPILED_WHOLE)
            return
        try:
            refused = branch.wire(forward.watch.wiring())
        except ValueError as error:
            branch.wiring = Wiring({}, tuple(forward.called), (len(self.blocks),), frozenset())
            self.say(f"{error}; nothing is reused there")
            return
        for why in refused:
            self.say(f"a site is left out, {why}")
        self._check_rows(branch)
        for unit in branch.units:
            self._store_watched(forward, unit)
        for probe in branch.probes:
            self._store_watched(forward, probe)
        branch.stats.decided["first step"] += len(branch.units)

    def _check_rows(self, branch: Branch) -> None:
        """Leave out rules whose table was made for another number of chains."""
        for unit in list(branch.units):
            policy = self.recipe.rules[unit.rule].policy
            if isinstance(policy, MaskTable) and len(policy.computed) not in (1, unit.rows):
                branch.units.remove(unit)
                self.say(
                    f"a rule is left out: its table has {len(policy.computed)} rows "
                    f"and the model {unit.rows} chains of blocks"
                )

    def _store_watched(self, forward: Forward, part: Unit | Probe) -> None:
        if part.first not in forward.edges or part.last not in forward.edges:
            return
        branch = forward.branch
        bound, output = forward.edges[part.first][0], forward.edges[part.last][1]
        entered = {n: x.clone() for n, x in branch.streams(part.first, bound).items()}
        if isinstance(part, Probe):
            part.reference = signals.probe_residual(branch, part, entered, output)
            return
        forward.inputs[part] = entered
        self._store(forward, part, output)

    # ---- accounting ----------------------------------------------------------------------------

    def _account(self, forward: Forward) -> None:
        run: Run = self._local.run
        branch = forward.branch
        for number, unit in enumerate(branch.units):
            unit.streak = unit.streak + 1 if number in forward.reused else 0
        branch.stats.record(len(forward.called), branch.skipped(forward.reused))
        if forward.step.index == len(run.steps) - 1:
            branch.drop()
            if run.calls >= run.calls_before:
                self._finish(run)

    def hand_over(self, tracker: Tracker) -> None:
        """Another denoiser of the pipeline goes on with this thread's run, if it is the same."""
        run: Run | None = getattr(self._local, "run", None)
        if run is not None and tracker.takes_over_from(self._tracker):
            self._finish(run, is_complete=True)
            self._release(run)

    def _finish(self, run: Run, is_complete: bool = False) -> None:
        if run.stats.is_finished:
            return
        run.stats.is_finished = True
        is_complete = is_complete or run.step == len(run.steps) - 1
        if is_complete and not run.stats.skipped():
            self.say(signals.nothing_reused(self.recipe, run.stats))

    def _drop(self, run: Run, reason: str) -> None:
        run.stats.reasons[reason] += 1
        self.say(f"{reason}; the cache was dropped")
        self._release(run)

    @staticmethod
    def _release(run: Run) -> None:
        for branch in run.branches:
            branch.drop()

    def _abandon(self) -> None:
        self._local.forward = None
        self._local.run = None
        self._tracker.forget()

    def _bypass(self, reason: str) -> None:
        run: Run | None = getattr(self._local, "run", None)
        if run is not None:
            run.stats.reasons[reason] += 1
        self.say(f"bypassed: {reason}")

    def say(self, message: str) -> None:
        """Once per enabling, however often it happens."""
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s: %s", type(self.denoiser).__name__, message)


def _edges(blocks: Blocks, recipe: Recipe) -> tuple[frozenset[int], frozenset[int]]:
    """Blocks at which a unit or probe may begin and end: list borders and the limits of sites."""
    numbers = list(blocks)
    starts = {0}
    ends = {len(numbers) - 1}
    for before, after in zip(numbers, numbers[1:], strict=False):
        if before.group != after.group:
            ends.add(before.index)
            starts.add(after.index)
    for rule in recipe.rules:
        lo, hi = rule.site.limits(len(numbers))
        if rule.site.scope == "block":
            starts |= set(range(lo, hi))
            ends |= set(range(lo, hi))
        starts.add(lo)
        ends |= {hi - 1, max(lo - 1, 0)}
    return frozenset(starts), frozenset(ends)
