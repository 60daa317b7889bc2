"""Draws a plan in a terminal: steps to the right, groups of like blocks downwards."""

from collections.abc import Iterator

from rich.text import Text

from blockcache.errors import PlanError
from blockcache.plan import Layout, MaskTable, Plan, Rule, Step, even_steps, steps_from_sigmas

COMPUTED, REUSED = "█", "·"
_MOST_BLOCKS = 10_000


def plan_lines(plan: Plan, width: int = 80) -> Iterator[Text]:
    """The lines of the drawing, at most `width` characters wide where that is possible.

    Raises:
        PlanError: a mask that does not fit the plan's own number of blocks.
    """
    mark = plan.fingerprint
    if not 0 < mark.blocks <= _MOST_BLOCKS:
        raise PlanError(f"the plan is for a model of {mark.blocks} blocks; nothing to draw")
    made_for = ", ".join(filter(None, (f"{mark.blocks} blocks", mark.sampler, mark.dtype)))
    yield Text(f"{plan.recipe.name}: {plan.total} steps of {mark.model} ({made_for})", "bold")
    for rule in plan.recipe.rules:
        yield Text(f"  {_words(rule)}", "dim")
    if plan.recipe.is_static():
        yield from _drawing(plan, max(width, 30))
    else:
        yield Text("Decided while it runs; `blockcache compare` draws what was decided.")
    if plan.reached:
        reached = (f"{name} {value:.4g}" for name, value in plan.reached.items())
        yield Text("reached: " + ", ".join(reached))
    if plan.note:
        yield Text(plan.note)


def computed_blocks(plan: Plan, branch: int = 0) -> list[tuple[bool, ...]]:
    """`[blocks][steps]`, True where a static plan computes in this denoiser call of a step.

    Raises:
        PlanError: a mask that does not fit the plan's own number of blocks.
    """
    layout = Layout((plan.fingerprint.blocks,))
    mask = [[True] * plan.total for _ in range(layout.blocks)]
    for rule in plan.recipe.rules:
        if not rule.is_for(branch):
            continue
        units = rule.site.units(layout)
        try:
            schedule = rule.schedule(_steps(plan, rule), len(units))
        except PlanError:
            raise
        except ValueError as error:
            raise PlanError(f"the plan does not fit itself: {error}") from None
        for (lo, hi), row in zip(units, schedule or (), strict=False):
            for step, asked in enumerate(row):
                if not asked:
                    for block in range(lo, hi):
                        mask[block][step] = False
    return [tuple(row) for row in mask]


def _steps(plan: Plan, rule: Rule) -> tuple[Step, ...]:
    """The steps the rule's own table was made for, where they are written down."""
    policy = rule.policy
    if isinstance(policy, MaskTable) and len(policy.sigmas) == plan.total:
        return steps_from_sigmas(policy.sigmas)
    return even_steps(plan.total)


def _drawing(plan: Plan, width: int) -> Iterator[Text]:
    named = sorted({rule.branch for rule in plan.recipe.rules if rule.branch is not None})
    for branch in named or [0]:
        if named:
            yield Text(f"\nbranch {branch}", "dim")
        yield from _branch_drawing(plan, computed_blocks(plan, branch), width)


def _branch_drawing(plan: Plan, mask: list[tuple[bool, ...]], width: int) -> Iterator[Text]:
    groups = list(_groups(mask))
    margin = max(len(label) for label, _ in groups) + 2
    room = width - margin
    for start in range(0, plan.total, room):
        end = min(plan.total, start + room)
        yield Text()
        yield Text(" " * margin + _ruler(start, end), "dim")
        for label, row in groups:
            line = Text(label.ljust(margin))
            for computed in row[start:end]:
                line.append(*((COMPUTED, "blue") if computed else (REUSED, "yellow")))
            yield line
    yield Text()
    done = sum(map(sum, mask)) / (plan.total * len(mask))
    legend = Text.assemble((COMPUTED, "blue"), " computed  ", (REUSED, "yellow"), " reused")
    yield legend.append(f"   {done:.0%} of the block calls computed")


def _groups(mask: list[tuple[bool, ...]]) -> Iterator[tuple[str, tuple[bool, ...]]]:
    """Neighbouring blocks with the same row, as one."""
    first = 0
    for block, row in enumerate(mask):
        if block + 1 == len(mask) or mask[block + 1] != row:
            yield (f"blocks {first}-{block}" if block > first else f"block {block}"), row
            first = block + 1


def _ruler(start: int, end: int) -> str:
    """Step numbers at every tenth step."""
    line = [" "] * (end - start)
    for step in range(-(-start // 10) * 10, end, 10):
        digits = str(step)
        at = step - start
        if at + len(digits) <= len(line):
            line[at : at + len(digits)] = digits
    return "".join(line)


def _words(rule: Rule) -> str:
    site = rule.site
    where = site.scope if site.hi is None and site.lo == 0 else f"{site.scope} {site.lo}..{site.hi}"
    policy = "" if isinstance(rule.policy, MaskTable) else f"{rule.policy}, "
    guards = "".join(f", {guard}" for guard in rule.guards)
    call = "" if rule.branch is None else f" of branch {rule.branch}"
    corrector = "" if rule.corrector is None else f", corrected by {rule.corrector}"
    return f"{where}{call}: {policy}{rule.payload} by {rule.predictor}{corrector}{guards}"
