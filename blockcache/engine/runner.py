"""The runner: owns all mutable state, and is what the hooks call.

State belongs to (thread, run, branch, site). A run begins when the tracker says so and drops
everything of the run before, however that ended; so nothing leaks between runs, branches, threads
or exceptions. Whatever is not understood is computed, counted and said once.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from blockcache.engine import signals
from blockcache.engine.attention import SparseRun
from blockcache.engine.blocks import Blocks
from blockcache.engine.branch import Anchor, Branch, Unit
from blockcache.engine.deciding import Decider, GateDecider, Verdict, block_of_codebook
from blockcache.engine.groups import group_of
from blockcache.engine.hooks import Call
from blockcache.engine.identity import observed
from blockcache.engine.parts import Cell, Seen, find_parts, main_input, scope_of
from blockcache.engine.run import Forward, Run
from blockcache.engine.stats import BranchStats, RunStats
from blockcache.engine.tracker import Tracker, conditioning_of, scheduler_of_caller
from blockcache.engine.wiring import Values, Watch, Wiring, bind, mapped
from blockcache.plan.plan import Fingerprint
from blockcache.plan.policies import Codebook, Gate, MaskTable, StaticPolicy
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


class Runner:
    """Serves one denoiser."""

    def __init__(
        self,
        denoiser: nn.Module,
        blocks: Blocks,
        recipe: Recipe,
        scheduler: Any = None,
        group: Any = None,
        made_for: Fingerprint | None = None,
    ) -> None:
        """Nothing is allocated before the first forward.

        scheduler: used where no pipeline is found on the call stack. group: the processes that
        share a sample, where diffusers does not know them. made_for: of the recipe's plan.
        """
        self.denoiser, self.blocks, self.recipe = denoiser, blocks, recipe
        self.parts = find_parts(blocks, {r.site.scope for r in recipe.rules if r.site.is_sub_layer})
        self._group, self._made_for = group, made_for
        self.last_run: RunStats | None = None
        self._scheduler = scheduler
        self._names = signals.argument_names(denoiser)
        self._keeps_latents = any(rule.site.scope == "model" for rule in recipe.rules)
        self._needs_grid = any(
            isinstance(rule.policy, Gate) and rule.policy.signal == "filtered"
            for rule in recipe.rules
        )
        self._edges = _edges(blocks, recipe)
        self.siblings: list[Runner] = []
        """The runners of the pipeline's other denoisers."""
        self._local = threading.local()
        self._said: set[str] = set()
        self._runs = 0

    # ---- called by the hooks -------------------------------------------------------------------

    def forward(self, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the denoiser."""
        forward = self._begin(args, kwargs)
        with self._under_way(forward):
            output = self._called(forward, inner, args, kwargs)
        if forward is None:
            return output
        if forward.is_rejected:
            return self._again(forward, inner, args, kwargs)
        corrected = self._corrected(forward, output)
        if not self._end(forward, output):
            return inner(*args, **kwargs)
        return corrected

    @contextmanager
    def _under_way(self, forward: Forward | None) -> Iterator[None]:
        """The blocks are called for `forward`."""
        self._local.forward = forward
        try:
            yield
        except BaseException:
            # What was stored so far may be of mixed steps.
            self._abandon()
            raise
        self._local.forward = None

    def _called(
        self, forward: Forward | None, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The denoiser's output, reused as a whole or called for."""
        output = self._whole(forward) if forward is not None else None
        return inner(*args, **kwargs) if output is None else output

    def _whole(self, forward: Forward) -> Any:
        """The denoiser's own output, if that is what is reused; else None."""
        branch = forward.branch
        cell = branch.reused_cell(None, forward.cells)
        if cell is None:
            return None
        forward.is_whole = True
        forward.called, forward.reused = list(branch.called), frozenset()
        return branch.predict_cell(cell, forward.step, forward.latents)

    def _corrected(self, forward: Forward, output: Any) -> Any:
        """The denoiser's computed output, with what its rule has to make good."""
        branch, run = forward.branch, self._local.run
        cells = () if forward.is_whole or forward.watch else branch.cells_of(None)
        for cell in (branch.cells[number] for number in cells):
            if cell.history:
                gap = run.steps[cell.steps[0].index + 1 : forward.step.index]
                return branch.corrected_cell(cell, forward.step, gap, output)
        return output

    def _again(
        self, forward: Forward, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute a step whose forecast was rejected at its last block."""
        branch = forward.branch
        full = Forward(forward.step, branch, forward.latents, roles=branch.roles(frozenset()))
        full.sparse, full.is_retry = forward.sparse, True
        full.decided["forecast rejected"] = len(branch.reusables)
        with self._under_way(full):
            output = inner(*args, **kwargs)
        self._end(full, output)
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
        if moment.is_new_run:
            self._remark_on_plan(self._start_run(), scheduler, named)
        run: Run = self._local.run
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
        if forward.sparse is not None:
            inner = forward.sparse.around(index, inner)
        if forward.watch is not None:
            return self._watched(forward, index, inner, args, kwargs)
        role = forward.roles.get(index)
        if role is None:
            return inner(*args, **kwargs)
        if role.ask:
            self._ask(forward, role.ask, index, args, kwargs)
            role = forward.roles[index]
        if role.enter:
            self._enter(forward, role.enter, index, args, kwargs)
        if role.skip is not None:
            output = self._skip(forward, role.skip, index, inner, args, kwargs)
        else:
            output = inner(*args, **kwargs)
        for part in role.leave:
            if isinstance(part, Decider):
                self._passed(forward, part, forward.inputs.pop(part, {}), output)
            else:
                output = self._store(forward, part, output)
        return output

    def part(self, number: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of part `number`, a sub-layer."""
        forward: Forward | None = getattr(self._local, "forward", None)
        if forward is None:
            return inner(*args, **kwargs)
        forward.parts.append(number)
        part, branch = self.parts[number], forward.branch
        entered = main_input(args, kwargs) if part.kind == "transformer" else None
        cell = branch.reused_cell(number, forward.cells)
        if cell is not None:
            return branch.predict_cell(cell, forward.step, entered)
        if entered is not None:
            # A copy, for the module may write into its input.
            entered = entered.clone()
        output = inner(*args, **kwargs)
        if forward.watch is not None:
            scope = scope_of(part, args, kwargs, output)
            forward.seen.append(Seen(part, scope, entered, mapped(output, torch.Tensor.clone)))
        for other in branch.cells_of(number):
            self._store_cell(forward, branch.cells[other], entered, output)
        return output

    def _end(self, forward: Forward, output: Any) -> bool:
        """Take stock of a finished forward. False if its output cannot be trusted."""
        branch = forward.branch
        if forward.watch is not None:
            forward.seen.append(Seen(None, "model", forward.latents, output))
            self._finish_watch(forward)
        elif branch.wiring is None or tuple(forward.called) != branch.wiring.called:
            # The model did not call the blocks it called before: what is stored has no use.
            self._drop(self._local.run, "the model did not call the same blocks as before")
            branch.wiring = None
            return not (forward.reused or forward.cells)
        elif not forward.is_whole:
            for number in branch.cells_of(None):
                self._store_cell(forward, branch.cells[number], forward.latents, output)
        for decider in branch.deciders:
            decider.finished(self._local.run, forward, output)
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
    def needs_no_blocks(self) -> bool:
        """Whether it only reuses the denoiser's own output, so that it may be compiled whole."""
        scopes = {rule.site.scope for rule in self.recipe.rules}
        return scopes == {"model"}

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
        group = self._group or group_of(self.denoiser)
        run = Run(self.recipe, self._tracker.steps, RunStats(self._runs), group)
        run.adapter = signals.adapter_state(self.denoiser)
        if any(rule.site.scope in ("span", "deep", "block") for rule in self.recipe.rules):
            run.objection = signals.offloading_objection(self.blocks)
        if self.recipe.sparse is not None:
            run.sparse = SparseRun(self.recipe.sparse, self.denoiser, self.blocks, self.say)
            run.stats.attention = run.sparse.stats
        self._local.run = run
        self.last_run = run.stats
        return run

    def _remark_on_plan(self, run: Run, scheduler: Any, named: dict[str, Any]) -> None:
        """Say where a run is not what its plan was made for."""
        if self._made_for is not None:
            here = observed(self.denoiser, self.blocks, scheduler, named, self._names)
            if others := self._made_for.differences(here):
                what = ", ".join(others)
                self.say(f"the plan's measured figures do not hold here: {what}")
        total = len(run.steps)
        if self._tracker.scheduled < _FEW_STEPS and self.recipe.rules:
            self.say(f"a run of {total} steps leaves little to reuse; expect loss without gain")
        if any(rule.corrector for rule in self.recipe.rules) and run.steps[0].stride is None:
            sampler = type(scheduler).__name__
            self.say(
                f"the corrector is left out: it needs a plain Euler sampler, not {sampler}",
                logging.INFO,
            )
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
        run.verdicts.clear()
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
            run.branches.append(self._new_branch(stats))
            if self._needs_grid:
                run.branches[-1].arrangement = signals.arrangement_of(self.denoiser, named)
        branch = run.branches[number]
        if run.names.is_exchanged:
            self._forget(run, number)
        branch.form, branch.step = form, step.index
        latents = signals.latents_of(named, self._names) if self._keeps_latents else None
        branch.latents = latents
        if branch.wiring is None:
            forward = Forward(step, branch, latents, watch=Watch(self.blocks))
        else:
            forward = Forward(step, branch, latents)
            self._choose(run, forward)
        if run.sparse is not None:
            forward.sparse = run.sparse.forward(number, step, named)
        return forward

    def _new_branch(self, stats: BranchStats) -> Branch:
        return Branch(self.recipe, self.blocks, stats)

    @staticmethod
    def _forget(run: Run, number: int) -> None:
        run.branches[number].drop()
        if run.sparse is not None:
            run.sparse.drop(number)

    def _retire(self, run: Run, form: Any, step: Step) -> None:
        """Another size is another stage: branches of the old size will not be called again."""
        for number, branch in enumerate(run.branches):
            is_current = branch.step == step.index
            if not is_current and signals.sizes(branch.form) != signals.sizes(form):
                self._forget(run, number)

    # ---- deciding ------------------------------------------------------------------------------

    def _choose(self, run: Run, forward: Forward) -> None:
        """What is reused, as far as that is known before the first block."""
        branch, step = forward.branch, forward.step
        verdicts = {d.number: d.before(run, branch, step) for d in branch.deciders}
        units = set()
        for number, unit in enumerate(branch.units):
            if self._is_reused(run, branch, unit, verdicts, step, forward):
                units.add(number)
        cells = set()
        for number, cell in enumerate(branch.cells):
            if self._is_reused(run, branch, cell, verdicts, step, forward):
                cells.add(number)
        forward.reused, forward.cells = branch.compatible(units), frozenset(cells)
        forward.roles = branch.roles(forward.reused)
        forward.unneeded = frozenset(
            unit
            for unit in branch.units
            if isinstance(self.recipe.rules[unit.rule].policy, StaticPolicy)
            and not self._is_needed(branch, unit, step)
        )
        for number, unit in enumerate(branch.units):
            if unit in forward.unneeded and number not in forward.reused:
                # What is computed now is not kept, and what is older must not be taken for it.
                unit.history.clear()

    def _is_reused(
        self,
        run: Run,
        branch: Branch,
        part: Unit | Cell,
        verdicts: dict[int, Verdict | None],
        step: Step,
        forward: Forward,
    ) -> bool:
        if not isinstance(self.recipe.rules[part.rule].policy, StaticPolicy):
            return self._is_reused_online(branch, part, verdicts, forward)
        asked = self._schedule(run, part)[part.row][step.index]
        if not asked and not part.history:
            asked = "no history"
        forward.decided[asked or "reuse"] += 1
        return not asked

    def _is_reused_online(
        self,
        branch: Branch,
        part: Unit | Cell,
        verdicts: dict[int, Verdict | None],
        forward: Forward,
    ) -> bool:
        verdict = verdicts.get(part.rule)
        if verdict is None:
            return False
        if verdict.rows and isinstance(part, Unit):
            forward.partly[part] = verdict.rows
        is_chosen = part.row in verdict.units
        decides_here = self._decides_before(branch, part.rule)
        if decides_here:
            forward.decided[verdict.asked or ("ranked" if is_chosen else "reuse")] += 1
        return not verdict.asked and not verdict.rows and not is_chosen

    @staticmethod
    def _decides_before(branch: Branch, rule: int) -> bool:
        """Whether a rule decides before the first block; else its decision is counted there."""
        return not any(
            d.number == rule and d.first <= d.last and isinstance(d, GateDecider)
            for d in branch.deciders
        )

    def _schedule(self, run: Run, unit: Unit | Cell) -> Schedule:
        key = (unit.rule, unit.rows)
        if key not in run.schedules:
            run.schedules[key] = self.recipe.rules[unit.rule].schedule(run.steps, unit.rows)
        schedule = run.schedules[key]
        if schedule is None:
            raise RuntimeError("an online rule has no schedule")
        return schedule

    def _ask(
        self,
        forward: Forward,
        deciders: tuple[Decider, ...],
        index: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Let rules decide that look at what enters their site."""
        forward.bound = bind(self.blocks.blocks[index], args, kwargs)
        for decider in deciders:
            self._passed(forward, decider, {}, None)
        forward.bound = {}

    def _passed(self, forward: Forward, decider: Decider, entered: Values, output: Any) -> None:
        """The blocks a rule looks at are done: let it decide."""
        run: Run = self._local.run
        branch = forward.branch
        units = branch.numbers_of(decider.number)
        if forward.is_retry and isinstance(decider, GateDecider):
            decider.look(run, forward, entered, output)
            return
        verdict = decider.passed(run, forward, entered, output)
        if verdict is None:
            return
        forward.decided[verdict.asked or ("reuse" if not verdict.rows else "per sample")] += 1
        if verdict.rows:
            forward.partly |= {branch.units[number]: verdict.rows for number in units}
        elif not verdict.asked:
            forward.reused = branch.compatible({*forward.reused, *units})
            forward.roles = branch.roles(forward.reused)

    # ---- doing ---------------------------------------------------------------------------------

    def _enter(
        self,
        forward: Forward,
        parts: tuple[Unit | Decider, ...],
        index: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Copy what enters computed units and probes: a block may write into its input."""
        wanted = [part for part in parts if part not in forward.unneeded and part.needs_input]
        if wanted:
            entered = forward.branch.inputs(index, args, kwargs)
            for part in wanted:
                forward.inputs[part] = {name: x.clone() for name, x in entered.items()}

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

    def _store(self, forward: Forward, unit: Unit, output: Any) -> Any:
        """Keep what a computed unit put out. Returns what the model gets to see of it."""
        entered = forward.inputs.pop(unit, None)
        branch, rows = forward.branch, forward.partly.get(unit)
        if entered is None:
            return output
        fresh = output
        if rows is not None:
            output = branch.mixed(unit, forward.step, entered, fresh, rows)
        if not self._is_needed(branch, unit, forward.step):
            return output
        payload = branch.payload(unit, entered, fresh)
        if not payload:
            return output
        if rows is not None:
            payload = branch.mixed_payload(unit, payload, rows)
        elif unit.row == 0 and unit.history:
            older = [anchor.payload for anchor in unit.history]
            signals.note_drift(branch, payload, older, branch.weights(unit, forward.step))
        if unit.history and unit.history[0].step == forward.step:
            # From the first attempt at a step that is computed again.
            unit.history.popleft()
        unit.history.appendleft(Anchor(forward.step, payload))
        forward.has_stored = True
        return output

    def _store_cell(
        self, forward: Forward, cell: Cell, entered: torch.Tensor | None, output: Any
    ) -> None:
        if not self._is_needed(forward.branch, cell, forward.step):
            # What is older must not be taken for what is computed now.
            cell.history.clear()
            return
        rule = self.recipe.rules[cell.rule]
        if cell.history and cell.history[0][0] == forward.step:
            cell.history.popleft()
        fresh = cell.values(rule, entered, output)
        if cell.part is None and cell.history:
            older = [values for _, values in cell.history]
            weights = rule.predictor.weights(forward.step, cell.steps)
            signals.note_drift(forward.branch, fresh, older, weights)
        cell.history.appendleft((forward.step, fresh))
        forward.has_stored = True

    def _is_needed(self, branch: Branch, unit: Unit | Cell, step: Step) -> bool:
        """Whether a later reused step may look back on this one."""
        run: Run = self._local.run
        rule = self.recipe.rules[unit.rule]
        if not isinstance(rule.policy, StaticPolicy):
            return step.index < len(run.steps) - 1
        row = self._schedule(run, unit)[unit.row]
        computed_since = 0
        for index in range(step.index + 1, len(row)):
            if not row[index]:
                return True
            # A layer over it may be reused at a step that it would be computed in.
            computed_since += not branch.is_layered or self._is_full(run, branch, index)
            if computed_since >= rule.depth:
                return False
        return False

    def _is_full(self, run: Run, branch: Branch, index: int) -> bool:
        """Whether it is known that everything is computed at step `index`."""
        return all(
            isinstance(self.recipe.rules[part.rule].policy, StaticPolicy)
            and self._schedule(run, part)[part.row][index]
            for part in branch.reusables
        )

    def _release_spent(self, run: Run, branch: Branch, step: Step) -> None:
        """Forget what no later step reuses, nor corrects: a site whose part of the run is over."""
        for part in branch.reusables:
            rule = self.recipe.rules[part.rule]
            is_open = rule.corrector is not None and part.streak > 0
            if isinstance(rule.policy, StaticPolicy) and not is_open:
                if all(self._schedule(run, part)[part.row][step.index + 1 :]):
                    part.history.clear()

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
            forward.edges[index] = (
                entered,
                mapped(output, torch.Tensor.clone) if index in ends else None,
            )
        return output

    def _finish_watch(self, forward: Forward) -> None:
        branch = forward.branch
        watch = forward.watch
        if watch is None:
            raise RuntimeError("not watching")
        try:
            refused = branch.wire(watch.wiring(), forward.seen)
        except ValueError as error:
            branch.wiring = Wiring({}, tuple(forward.called), (len(self.blocks),), frozenset())
            self.say(f"{error}; nothing is reused there")
            return
        if forward.called:
            for why in refused:
                self.say(f"a site is left out, {why}")
        elif not self.needs_no_blocks:
            self.say(COMPILED_WHOLE)
        self._check_rows(branch)
        for unit in branch.units:
            self._store_watched(forward, unit)
        for decider in branch.deciders:
            self._store_watched(forward, decider)
        self._store_seen(forward)
        forward.decided["first step"] += len(branch.reusables)

    def _check_rows(self, branch: Branch) -> None:
        """Leave out rules whose table was made for another number of chains or sub-layers."""
        for part in branch.reusables:
            policy, site = self.recipe.rules[part.rule].policy, self.recipe.rules[part.rule].site
            if isinstance(policy, MaskTable) and len(policy.computed) not in (1, part.rows):
                branch.units = [unit for unit in branch.units if unit is not part]
                branch.cells = [cell for cell in branch.cells if cell is not part]
                branch.settle()
                what = f"{site.scope} sub-layers" if site.is_sub_layer else "chains of blocks"
                self.say(
                    f"a rule is left out: its table has {len(policy.computed)} rows "
                    f"and the model {part.rows} {what}"
                )
        for number, rule in enumerate(self.recipe.rules):
            is_empty = not branch.of_rule(number) and not branch.cells
            if rule.site.is_sub_layer and is_empty and rule.is_for(branch.number):
                self.say(
                    f"a rule is left out: no {rule.site.scope!r} sub-layer was called; inside "
                    "compiled blocks none can be seen, use the site 'block' there"
                )

    def _store_watched(self, forward: Forward, part: Unit | Decider) -> None:
        if part.first not in forward.edges or part.last not in forward.edges:
            return
        branch = forward.branch
        bound, output = forward.edges[part.first][0], forward.edges[part.last][1]
        entered = {n: x.clone() for n, x in branch.streams(part.first, bound).items()}
        if isinstance(part, Unit):
            forward.inputs[part] = entered
            self._store(forward, part, output)
            return
        forward.bound = bound
        if isinstance(part, GateDecider):
            part.look(self._local.run, forward, entered, output)
        else:
            part.passed(self._local.run, forward, entered, output)

    def _store_seen(self, forward: Forward) -> None:
        """The calls of sub-layers in a branch's first forward."""
        branch = forward.branch
        while forward.seen:
            # One by one, so that the copies made while watching do not all stay.
            seen = forward.seen.pop()
            for number in branch.cells_of(seen.number):
                self._store_cell(forward, branch.cells[number], seen.entered, seen.output)

    # ---- accounting ----------------------------------------------------------------------------

    def _account(self, forward: Forward) -> None:
        run: Run = self._local.run
        branch = forward.branch
        course = branch.course(forward.reused)
        parts = {None, *forward.parts}
        for number, unit in enumerate(branch.units):
            is_computed = number in course.computed and not forward.is_whole
            unit.streak = 0 if is_computed else unit.streak + 1
        reused = {branch.cells[number].part for number in forward.cells}
        for cell in branch.cells:
            is_computed = cell.part in parts and cell.part not in reused
            cell.streak = 0 if is_computed else cell.streak + 1
        skipped = frozenset(branch.called) if forward.is_whole else course.skipped
        branch.stats.record(len(forward.called), skipped, bool(skipped) or forward.is_whole)
        covered = [number for number in forward.parts if branch.cells_of(number)]
        branch.stats.record_parts(len(covered), sum(number in reused for number in covered))
        branch.stats.decided += forward.decided
        if forward.has_stored:
            held = sum(branch.cache_bytes() for branch in run.branches)
            run.stats.cache_bytes = max(run.stats.cache_bytes, held)
        self._release_spent(run, branch, forward.step)
        if forward.step.index == len(run.steps) - 1:
            branch.drop()
            if run.sparse is not None:
                run.sparse.drop(run.branches.index(branch))
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
        if run.sparse is not None:
            run.sparse.finish()
        if not is_complete:
            return
        for rule in self.recipe.rules:
            if not any(rule.is_for(number) for number in range(len(run.branches))):
                self.say(
                    f"a rule is left out: it is for branch {rule.branch}, and a step calls the "
                    f"model {len(run.branches)} times (a batch of both counts once)"
                )
        if self.recipe.rules and not run.stats.reused_anything():
            self.say(signals.nothing_reused(self.recipe, run.stats))

    def _drop(self, run: Run, reason: str) -> None:
        run.stats.reasons[reason] += 1
        self.say(f"{reason}; the cache was dropped")
        self._release(run)

    @staticmethod
    def _release(run: Run) -> None:
        for branch in run.branches:
            branch.drop()
        if run.sparse is not None:
            run.sparse.drop()

    def _abandon(self) -> None:
        self._local.forward = None
        self._local.run = None
        self._tracker.forget()

    def _bypass(self, reason: str) -> None:
        run: Run | None = getattr(self._local, "run", None)
        if run is not None:
            run.stats.reasons[reason] += 1
        self.say(f"bypassed: {reason}")

    def say(self, message: str, level: int = logging.WARNING) -> None:
        """Once per enabling, however often it happens."""
        if message not in self._said:
            self._said.add(message)
            logger.log(level, "%s: %s", type(self.denoiser).__name__, message)


def _edges(blocks: Blocks, recipe: Recipe) -> tuple[frozenset[int], frozenset[int]]:
    """Blocks at which a unit or probe may begin and end: list borders and the limits of sites."""
    rules = [r for r in recipe.rules if not r.site.is_sub_layer and r.site.scope != "model"]
    if not rules:
        return frozenset(), frozenset()
    numbers = list(blocks)
    starts = {0}
    ends = {len(numbers) - 1}
    for before, after in zip(numbers, numbers[1:], strict=False):
        if before.group != after.group:
            ends.add(before.index)
            starts.add(after.index)
    for rule in rules:
        lo, hi = rule.site.limits(len(numbers))
        if rule.site.scope == "block":
            starts |= set(range(lo, hi))
            ends |= set(range(lo, hi))
        starts.add(lo)
        ends |= {hi - 1, max(lo - 1, 0)}
        if isinstance(rule.policy, Codebook):
            looked_at = block_of_codebook(rule.policy, range(len(numbers)))
            starts.add(looked_at)
            ends.add(looked_at)
    return frozenset(starts), frozenset(ends)
