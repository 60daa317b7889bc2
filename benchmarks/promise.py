"""Whether tuned plans keep their promise: `python -m benchmarks.promise`.

Ten tunings of the embedded image model, each with calibration prompts of its own, for 28, 32 and
36 dB in turn. Each plan then renders fresh prompts that nothing was tuned on. Writes
`results/promise.json` after each tuning; the same command goes on from there. The table goes into
docs/tuning.md by `python -m benchmarks.readme`.
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

import blockcache
from benchmarks.presets import commit
from blockcache.pipelines import models
from blockcache.pipelines.embedded.world import held_out_prompts
from blockcache.pipelines.options import quiet_hosts
from blockcache.tuning import environment, quality
from blockcache.tuning.stage import Item, Stage, items_of

RESULTS = Path(__file__).resolve().parent / "results" / "promise.json"
GOALS = (28, 32, 36)
PROMPTS, FRESH, FRESH_SEED, FIRST_SEED = 24, 32, 999, 900_000
COLUMNS = (
    "", "goal dB", "met", "steps", "speed-up", "passes", "checked: median / worst",
    "fresh: median / worst", "kept",
)  # fmt: skip


def one(
    number: int, effort: str, pipe: Any, call: dict[str, Any], fresh: "Fresh"
) -> dict[str, Any]:
    """Tune once, with prompts that depend on `number`, and look at the fresh pictures."""
    goal = GOALS[number % len(GOALS)]
    with tempfile.TemporaryDirectory() as work:
        plan = blockcache.tune(
            pipe,
            held_out_prompts(PROMPTS, seed=300 + number),
            seeds=range(10_000 * (number + 1), 10_000 * (number + 1) + PROMPTS),
            psnr=goal,
            effort=effort,
            work=work,
            **call,
        )
    with blockcache.enabled(pipe, plan):
        found = fresh.decibels()
    reached = plan.reached
    return {
        "goal_db": goal,
        "met": bool(reached["met"]),
        "speedup": reached["speedup"],
        "passes": reached["passes"],
        # None of a plan that a limit left unchecked.
        "checked_db": [reached.get("psnr_db_median"), reached.get("psnr_db_worst")],
        "fresh_db": [statistics.median(found), min(found)],
        "kept": statistics.median(found) >= goal,
        "steps": len(plan.recipe.rules[0].policy.computed[0]),
        "note": plan.note,
    }


class Fresh:
    """Prompts that no tuning sees, and their uncached pictures."""

    def __init__(self, stage: Stage, items: Sequence[Item]) -> None:
        self._stage, self._items = stage, items
        self._pictures = [stage.render(item).picture for item in items]

    def decibels(self) -> list[float]:
        """PSNR of each as the pipeline renders now."""
        pictures = [self._stage.render(item).picture for item in self._items]
        return [quality.psnr(a, b) for a, b in zip(pictures, self._pictures, strict=True)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one row per tuning."""
    lines = [COLUMNS, ("--:",) * len(COLUMNS)]
    for number, row in enumerate(rows, 1):
        pairs = [_pair(row[name]) for name in ("checked_db", "fresh_db")]
        words = ["yes" if row[name] else "**no**" for name in ("met", "kept")]
        figures = (f"{row['speedup']:.2f}x", f"{row['passes']:.1f}")
        lines.append(
            (
                str(number),
                str(row["goal_db"]),
                words[0],
                str(row["steps"]),
                *figures,
                *pairs,
                words[1],
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pair(figures: Sequence[float | None]) -> str:
    return " / ".join("-" if figure is None else f"{figure:.1f}" for figure in figures)


@click.command()
@click.option("--tunings", type=click.IntRange(1), default=10, show_default=True)
@click.option("--effort", type=click.Choice(["full", "quick"]), default="full", show_default=True)
@click.option("--steps", type=int, help="The model's own if none.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=RESULTS)
def main(tunings: int, effort: str, steps: int | None, file: Path) -> None:
    """Tune, check, and write JSON and table."""
    torch.set_num_threads(1)
    quiet_hosts()
    model = models.find("tiny-image")
    call = model.call | ({} if steps is None else {"num_inference_steps": steps})
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    setup = {"effort": effort, "call": call, "versions": environment.versions()}
    rows = known["rows"] if known.get("setup") == setup else []
    pipe = models.load(model, torch.device("cpu"))
    seeds = range(FIRST_SEED, FIRST_SEED + FRESH)
    fresh = Fresh(Stage(pipe, call), items_of(held_out_prompts(FRESH, FRESH_SEED), seeds))
    for number in range(len(rows), tunings):
        rows.append(one(number, effort, pipe, call, fresh))
        kept, most = sum(row["kept"] for row in rows), max(row["passes"] for row in rows)
        about = (
            f"*kept in {kept} of {len(rows)}; tiny-image, {call['num_inference_steps']} steps, "
            f"{PROMPTS} prompts each, effort {effort!r}, at most {most:.1f} passes; "
            f"{FRESH} fresh prompts; commit {commit()}*"
        )
        data = {"setup": setup, "rows": rows, "markdown": f"{table(rows)}\n\n{about}"}
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        click.echo(f"{number + 1}: {rows[-1]}")
    click.echo(table(rows))


if __name__ == "__main__":
    main()
