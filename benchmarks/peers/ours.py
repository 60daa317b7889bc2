"""What the peers are raced against: fewer steps, and blockcache."""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import blockcache
from benchmarks.peers.ground import FEWER, OURS, Contender, Ground, Impossible, Lane
from blockcache import Plan, Recipe
from blockcache.methods.presets import BUDGETS
from blockcache.pipelines import samplers
from blockcache.plan import MaskTable
from blockcache.tuning.compare import Arm, Trial

GOALS: dict[str, dict[str, float]] = {
    **{f"psnr-{goal}": {"psnr": goal} for goal in (45, 40, 35, 30)},
    **{f"speedup-{goal}": {"speedup": goal} for goal in (2, 3, 4)},
}
"""What plans are tuned for, by their file: decibels of the median, or the best at a speed."""

_STEP_SHARES = (0.8, 0.66, 0.5, 0.4, 0.34, 0.28, 0.24, 0.2, 0.16, 0.12)
# The presets are three more of the first ones.
_CORRECTED_BUDGETS = (0.6, 0.4, 0.24, 0.2, 0.14, 0.12, 0.1)
_FADING_BUDGETS = (0.2, 0.16, 0.14, 0.12, 0.1, 0.08)
_BUDGETS = (0.6, 0.4, 0.24, 0.2, 0.12)
_TRACED_BUDGETS = (0.6, 0.4, 0.32, 0.24, 0.18, 0.14)

What = Recipe | Plan | str


def contenders(ground: Ground, plans: dict[str, Plan]) -> Iterator[Contender]:
    """Fewer steps and blockcache, in every setting that is raced."""
    yield from _fewer_steps(ground.steps)
    for word in BUDGETS:
        yield _ours("preset", word, word)
        yield from _same_levels(word, word)
    for name, plan in plans.items():
        # Two plans of one name are two contenders: what was measured belongs to one of them.
        text = json.dumps(plan.to_json(), sort_keys=True)
        mark = f"{zlib.crc32(text.encode()):08x}"
        yield _ours("tuned", name, plan, mark)
        yield from _same_levels(name, plan, mark)
    for budget in _CORRECTED_BUDGETS:
        yield _ours("corrected", f"budget {budget:g}", blockcache.recipes.corrected(budget))
    for budget in _FADING_BUDGETS:
        recipe = blockcache.recipes.corrected(budget, fade=True)
        yield _ours("corrected, fading", f"budget {budget:g}", recipe)
    for budget in _BUDGETS:
        yield _ours("geometric", f"budget {budget:g}", blockcache.recipes.geometric(budget))
    for budget in _TRACED_BUDGETS:
        yield _ours("dp_cache", f"budget {budget:g}", partial(_dp_cache, budget))


def tune_missing(
    ground: Ground, folder: Path, work: Path, effort: str, say: Callable[[str], None]
) -> None:
    """Plans for those of GOALS that `folder` has none for."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, goal in GOALS.items():
        file = folder / f"{name}.json"
        if file.is_file():
            continue
        prompts, seeds = zip(*ground.tuning, strict=True)
        say(f"tuning for {name}")
        plan = blockcache.tune(
            ground.fresh(),
            list(prompts),
            **goal,
            seeds=list(seeds),
            effort=effort,
            work=work / "tuning",
            rivals=samplers.rivals,
            **ground.call,
        )
        plan.save(file)
        say(plan.note)


def read(folder: Path) -> dict[str, Plan]:
    """The plan files in a folder, by their names."""
    return {file.stem: Plan.load(file) for file in sorted(folder.glob("*.json"))}


def _dp_cache(budget: float, ground: Ground) -> Recipe:
    return blockcache.recipes.dp_cache(ground.trace, budget=budget)


def _ours(
    family: str, setting: str, what: What | Callable[[Ground], Recipe], mark: str = ""
) -> Contender:
    def enter(ground: Ground) -> Lane:
        chosen = what(ground) if callable(what) else what
        return ground.lane(blockcache.enable(ground.fresh(), chosen))

    return Contender(OURS, family, setting, enter, mark)


def _fewer_steps(steps: int) -> Iterator[Contender]:
    counts = sorted({max(2, round(share * steps)) for share in _STEP_SHARES}, reverse=True)
    for count in counts:
        yield Contender(FEWER, "same sampler", f"{count} steps", partial(_plain, count))
        yield Contender(FEWER, "UniPC", f"{count} steps", partial(_unipc, count))


def _plain(count: int, ground: Ground) -> Lane:
    return ground.lane(ground.fresh(), count)


def _unipc(count: int, ground: Ground) -> Lane:
    pipe = ground.fresh()
    pipe.scheduler = samplers.unipc(pipe.scheduler)
    return ground.lane(pipe, count)


def _same_levels(name: str, what: What, mark: str = "") -> Iterator[Contender]:
    """No cache, but the noise levels that a plan computes."""
    arms = {"plan's sigmas": "same sampler", "UniPC, plan's sigmas": "UniPC"}
    for arm, sampler in arms.items():
        family = f"{sampler} on a plan's sigmas"
        yield Contender(FEWER, family, f"of {name}", partial(_pinned, arm, what), mark)


def _pinned(name: str, what: What, ground: Ground) -> Lane:
    pipe = ground.fresh()
    sigmas, timesteps = ground.levels
    computed = computed_steps(pipe, what, ground.steps, sigmas)
    trial = Trial(
        pipe=pipe,
        steps=ground.steps,
        # A clock by which a step takes one second: only the arms that need no clock are used.
        baseline_s=ground.steps,
        accelerated_s=len(computed),
        computed=tuple(float(step in computed) for step in range(ground.steps)),
        sigmas=sigmas,
        timesteps=timesteps,
        seconds=lambda arm: float(arm.steps or ground.steps),
    )
    arm: Arm = next(arm for arm in samplers.rivals(trial) if arm.name == name)
    if arm.objection:
        raise Impossible(arm.objection)
    return Lane(ground.lane(pipe).stage, arm.steps, arm.within)


def computed_steps(pipe: Any, what: What, steps: int, sigmas: Any) -> Sequence[int]:
    """The steps that a static plan computes.

    Raises:
        Impossible: it decides step by step, or not for all blocks at once.
    """
    plan = blockcache.plan_for(pipe, what, steps, sigmas)
    policies = [rule.policy for rule in plan.recipe.rules]
    masks = [policy.computed for policy in policies if isinstance(policy, MaskTable)]
    if plan.total != steps or len(policies) != 1 or len(masks) != 1 or len(masks[0]) != 1:
        raise Impossible("it does not compute whole steps of this run")
    return masks[0][0]
