"""What a tuning has to say about its plan: figures, words, and the race against rivals."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blockcache.tuning.compare import Arm
from blockcache.tuning.goal import Goal
from blockcache.tuning.scoring import Scorer
from blockcache.tuning.stage import Item, Stage


def asked_and_found(goal: Goal, figures: Sequence[float]) -> dict[str, float]:
    """The goal, and what the checked pictures reached. figures: per item, larger is nearer."""
    if goal.speedup is None:
        found = {"target": goal.target, "share": goal.share}
    else:
        found = {"target_speedup": goal.speedup}
    if not figures:
        return found
    found |= {
        f"{goal.name}_median": goal.sign * float(np.median(figures)),
        f"{goal.name}_mean": goal.sign * float(np.mean(figures)),
        f"{goal.name}_worst": goal.sign * min(figures),
        "checked": float(len(figures)),
    }
    if goal.speedup is None:
        found["margin"] = goal.typical(figures) - goal.sign * goal.target
    return found


def words_for(goal: Goal, reached: dict[str, float], how: str, why_not: str) -> list[str]:
    """The plan's note, line by line. why_not: why the goal is not met; empty if it is."""
    head = f"tuned for {goal.words()}"
    lines = [f"{head}: NOT MET, this is the closest ({why_not})" if why_not else head]
    if "checked" in reached:
        median, worst = reached[f"{goal.name}_median"], reached[f"{goal.name}_worst"]
        count = f"{reached['checked']:.0f} other pictures"
        lines.append(f"{goal.name} on {count}: median {median:.4g}, worst {worst:.4g}")
    cost = f"{reached['passes']:.1f} uncached passes, {reached['minutes']:.1f} min"
    return [*lines, how, f"found in {cost}"]


@dataclass(frozen=True)
class Raced:
    """One way of rendering. figures: per item, larger is nearer. seconds: median of one call."""

    name: str
    steps: int
    figures: tuple[float, ...]
    seconds: float


def race(stage: Stage, scorer: Scorer, goal: Goal, arm: Arm, items: Sequence[Item]) -> Raced:
    """Render `items` another way."""
    figures, seconds = [], []
    for item in items:
        with arm.within():
            found = stage.render(item, arm.steps)
        scorer.ledger.charge(found.seconds)
        if found.picture is None:
            raise RuntimeError("a render without a picture")
        figures.append(goal.figure(found.picture, scorer.picture(item)))
        seconds.append(found.seconds)
    steps = arm.steps or stage.steps
    return Raced(arm.name, steps, tuple(figures), statistics.median(seconds))


def words_on_rivals(goal: Goal, ours: Raced, rivals: Sequence[Raced], margin: float) -> list[str]:
    """Names the rivals that are as fast, up to `margin`, and nearer in the median and the worst."""
    lines = []
    for rival in rivals:
        is_fast = rival.seconds <= ours.seconds * margin
        is_near = goal.typical(rival.figures) >= goal.typical(ours.figures)
        if is_fast and is_near and min(rival.figures) >= min(ours.figures):
            theirs, own = (goal.sign * goal.typical(x.figures) for x in (rival, ours))
            lines.append(
                f"rival {rival.name} ({rival.steps} steps) is as fast and nearer: "
                f"{theirs:.4g} against {own:.4g}; no cache needed here"
            )
    return lines or ["no rival (fewer steps, other solvers) came as near in the same time"]
