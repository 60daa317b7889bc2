"""Why a run was as fast and as near as it was, as the plain numbers that figures are drawn from."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockcache.demo.watch import Side, distances_db
from blockcache.pipelines.sheets import panels_of
from blockcache.plan import Gate, MaskTable, Plan, Recipe, Rule

COMPUTED, REUSED, PREDICTED, PARTLY = range(4)
"""What happened to a block in a step. Partly: it was computed, and some sub-layers were reused."""

_FEWEST_PACED = 3
_EVEN_PACE = 1.3

KINDS = ("computed", "reused", "predicted", "sub-layers reused")


@dataclass(frozen=True, eq=False)
class Map:
    """`[blocks, steps]` of the kinds above, of the branches named in the title."""

    title: str
    kinds: NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Story:
    """One accelerated run beside its uncached twin.

    maps: the first is the first branch's. changes: (step, change) as the cache measured them;
    added up where the rule does so. threshold: below which they are reused; None where everything
    was decided beforehand. moved: per step the change of the uncached denoiser's output. errors_db:
    distance of the latents after every step, more is nearer. parts: seconds of (uncached,
    accelerated) by part. step_ms: per step of (uncached, accelerated). remarks: what the engine
    said.
    """

    maps: tuple[Map, ...]
    changes: tuple[tuple[int, float], ...]
    threshold: float | None
    moved: tuple[float | None, ...]
    errors_db: tuple[float, ...]
    parts: dict[str, tuple[float, float]]
    step_ms: tuple[tuple[float, ...], tuple[float, ...]]
    remarks: tuple[str, ...] = ()

    @property
    def step_kinds(self) -> tuple[int, ...]:
        """Per step what happened to most blocks in the first branch."""
        return tuple(int(np.bincount(column).argmax()) for column in self.maps[0].kinds.T)

    @property
    def computed_share(self) -> tuple[float, ...]:
        """Per step, the share of the blocks that were computed in the first branch."""
        kinds = self.maps[0].kinds
        return tuple(((kinds == COMPUTED) | (kinds == PARTLY)).mean(0).tolist())


def tell(
    plain: Side, fast: Side, summary: dict[str, Any], plan: Plan, remarks: tuple[str, ...] = ()
) -> Story:
    """The story of a pair."""
    maps = tuple(
        Map(panel.title, _kinds(panel.map.astype(bool), plan.recipe))
        for panel in panels_of(summary)
    )
    computed = [bool(column.all()) for column in (maps[0].kinds != REUSED).T]
    computed = [
        full and not (column == PREDICTED).any()
        for full, column in zip(computed, maps[0].kinds.T, strict=True)
    ]
    gate = next((r.policy for r in plan.recipe.rules if isinstance(r.policy, Gate)), None)
    return Story(
        maps=maps,
        changes=_seen_by(gate, fast.measured, computed),
        threshold=None if gate is None else gate.threshold,
        moved=plain.moved,
        errors_db=tuple(distances_db(fast, plain)),
        parts=_parts(plain, fast, computed),
        step_ms=(_milliseconds(plain), _milliseconds(fast)),
        remarks=remarks + _pace(plain, fast, computed),
    )


def _kinds(computed: NDArray[np.bool_], recipe: Recipe) -> NDArray[np.int8]:
    blocks, steps = computed.shape
    kinds = np.where(computed, COMPUTED, REUSED).astype(np.int8)
    for rule in reversed(recipe.rules):
        lo, hi = rule.site.limits(blocks)
        if rule.site.is_sub_layer:
            _mark_parts(kinds, rule, lo, hi)
        elif rule.predictor.depth > 1:
            # With one computed step behind it, any prediction is a copy.
            behind: NDArray[np.int64] = np.cumsum(computed, 1) - computed
            predicted = ~computed[lo:hi] & (behind[lo:hi] >= 2)
            kinds[lo:hi][predicted] = PREDICTED
    return kinds


def _mark_parts(kinds: NDArray[np.int8], rule: Rule, lo: int, hi: int) -> None:
    table, steps = rule.policy, kinds.shape[1]
    if not isinstance(table, MaskTable) or table.total != steps:
        return
    rows = table.computed * (hi - lo) if len(table.computed) == 1 else table.computed
    if len(rows) != hi - lo:
        # A row for each sub-layer: which blocks they are in is the model's to know.
        return
    for block, row in zip(range(lo, hi), rows, strict=True):
        for step in set(range(steps)) - set(row):
            if kinds[block, step] == COMPUTED:
                kinds[block, step] = PARTLY


def _seen_by(
    gate: Gate | None, measured: tuple[tuple[int, float], ...], computed: list[bool]
) -> tuple[tuple[int, float], ...]:
    """The changes as the gate compares them with its threshold."""
    if gate is None:
        return measured
    seen, total = [], 0.0
    for step, change in measured:
        total = gate.rescaled(change) + (total if gate.accumulate else 0.0)
        seen.append((step, total))
        if step < len(computed) and computed[step]:
            total = 0.0
    return tuple(seen)


def _pace(plain: Side, fast: Side, computed: list[bool]) -> tuple[str, ...]:
    """Whether the machine was as fast in both runs, by the steps that did the same work."""
    pairs = [
        (ours.denoiser_s, theirs.denoiser_s)
        for ours, theirs, is_computed in zip(fast.steps, plain.steps, computed, strict=False)
        if is_computed and ours.denoiser_s > 0
    ]
    if len(pairs) < _FEWEST_PACED:
        return ()
    times = statistics.median(theirs / ours for ours, theirs in pairs)
    if 1 / _EVEN_PACE <= times <= _EVEN_PACE:
        return ()
    pace = f"{times:.1f} times faster" if times > 1 else f"{1 / times:.1f} times slower"
    return (
        f"The machine was {pace} in the cached run than in the uncached one, so do not trust this "
        "speed-up: tick “Measure the uncached run anew” under “Size and more” and generate again",
    )


def _milliseconds(side: Side) -> tuple[float, ...]:
    return tuple(1e3 * step.seconds for step in side.steps)


def _parts(plain: Side, fast: Side, computed: list[bool]) -> dict[str, tuple[float, float]]:
    everything = [True] * len(plain.steps)
    return {
        "text and start": (plain.before_s, fast.before_s),
        "denoiser, computed steps": (_denoiser(plain, everything), _denoiser(fast, computed)),
        "denoiser, skipped steps": (0.0, _denoiser(fast, [not step for step in computed])),
        "sampler, cache and loop": (_rest(plain), _rest(fast)),
        "decoder": (plain.after_s, fast.after_s),
    }


def _denoiser(side: Side, counted: list[bool]) -> float:
    return sum(
        s.denoiser_s for s, is_counted in zip(side.steps, counted, strict=False) if is_counted
    )


def _rest(side: Side) -> float:
    return sum(step.seconds - step.denoiser_s for step in side.steps)


def computed_share(summary: dict[str, Any]) -> float:
    """Share of the block calls that were done, over all branches of all denoisers."""
    branches = [branch for model in summary["models"] for branch in model["branches"]]
    calls = sum(branch["block_calls"] for branch in branches)
    return 1 - sum(branch["block_calls_skipped"] for branch in branches) / calls if calls else 1.0


def parts_share(summary: dict[str, Any]) -> float | None:
    """Share of the sub-layer calls that were reused; None where no rule is about them."""
    branches = [branch for model in summary["models"] for branch in model["branches"]]
    calls = sum(branch["part_calls"] for branch in branches)
    return sum(branch["part_calls_reused"] for branch in branches) / calls if calls else None


def density(summary: dict[str, Any]) -> float | None:
    """Kept share of the attention blocks, mean over the denoisers; None where it is dense."""
    known = [model["attention"]["density"] for model in summary["models"] if model["attention"]]
    known = [value for value in known if value is not None]
    return statistics.fmean(known) if known else None
