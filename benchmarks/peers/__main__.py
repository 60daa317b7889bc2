"""The race: `python -m benchmarks.peers`.

Every peer's settings are tried on a few prompts; the best of each method then race against fewer
steps and blockcache on others, in turns with the uncached run, one CPU thread. Writes
`results/peers.json`, the plot, and what README and docs/race.md show (`python -m
benchmarks.readme`). A run that was cut goes on where it was.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.peers import cache_dit_caches, diffusers_caches, ours, pages
from benchmarks.peers.figures import figures
from benchmarks.peers.ground import Contender, Ground, Impossible
from benchmarks.peers.track import LIBRARIES, Log, OutOfTime, Track, about, has_effect, summaries
from benchmarks.presets import commit
from blockcache.errors import BlockCacheError
from blockcache.pipelines import models
from blockcache.pipelines.options import quiet_hosts
from blockcache.tuning import environment


@click.command()
@click.option("--model", default="tiny-image", show_default=True, help="tiny-image or tiny-video.")
@click.option("--folder", type=click.Path(path_type=Path), help="Load the model from here.")
@click.option("--steps", type=click.IntRange(8), default=50, show_default=True)
@click.option(
    "--call", "changed", type=(str, int), multiple=True, help="As in --call height 64; repeatable."
)
@click.option("--prompts", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--sweep", "trials", type=click.IntRange(1, 4), default=4, help="Prompts of the sweep."
)
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Per prompt.")
@click.option("--keep", type=click.IntRange(1), default=6, show_default=True, help="Per peer.")
@click.option("--minutes", type=click.FloatRange(0), help="Stop then; the next call goes on.")
@click.option("--effort", type=click.Choice(["full", "quick"]), default="full", show_default=True)
@click.option("--plans", type=click.Path(path_type=Path), help="Tuned plans; made if missing.")
@click.option("--tune/--no-tune", default=True, show_default=True, help="Make missing plans.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("outputs/peers"))
@click.option("--only", multiple=True, help="Methods whose name has this in it; may be repeated.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=pages.RESULTS)
@click.option("--plot", type=click.Path(path_type=Path), default=pages.PLOT)
def main(
    model: str,
    folder: Path | None,
    steps: int,
    changed: tuple[tuple[str, int], ...],
    prompts: int,
    trials: int,
    rounds: int,
    keep: int,
    minutes: float | None,
    effort: str,
    plans: Path | None,
    tune: bool,
    work: Path,
    only: tuple[str, ...],
    file: Path,
    plot: Path,
) -> None:
    """Race, and write JSON, tables and plot."""
    torch.set_num_threads(1)
    quiet_hosts()
    name = f"{model}-{steps}"
    try:
        ground = _ground(model, folder, steps, dict(changed), prompts)
        ground.sweep = ground.sweep[:trials]
        place = plans or pages.RESULTS.parent / "plans" / name
        if tune:
            ours.tune_missing(ground, place, work / name, effort, click.echo)
        known = ours.read(place)
        log = Log(work / name / "log.jsonl", about(ground))
    except (Impossible, BlockCacheError) as error:
        raise click.ClickException(str(error)) from None
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    track = Track(ground, log, deadline, click.echo)
    swept = _peers(steps, only)
    others = [c for c in ours.contenders(ground, known) if _is_asked(c, only)]
    try:
        track.race([*track.sweep(swept, keep), *others], rounds)
    except OutOfTime:
        click.echo("out of time; the same command goes on from here")
    race = _race(ground, log, swept, others, track.floor_db)
    if not race["prompts"]:
        return
    _write(file, name, race)
    pages.draw(json.loads(file.read_text(encoding="utf-8"))["races"].values(), plot)
    click.echo(pages.compact({name: race}))


def _ground(
    name: str, folder: Path | None, steps: int, changed: dict[str, int], prompts: int
) -> Ground:
    found = models.find(str(folder or name))
    pipe = models.load(found, torch.device("cpu"))
    return Ground(models.Model(name, found.source, found.call), pipe, steps, changed, prompts)


def _is_asked(contender: Contender, only: tuple[str, ...]) -> bool:
    return not only or any(part.lower() in contender.family.lower() for part in only)


def _peers(steps: int, only: tuple[str, ...]) -> list[Contender]:
    every = (*diffusers_caches.contenders(steps), *cache_dit_caches.contenders(steps))
    return [contender for contender in every if _is_asked(contender, only)]


def _race(
    ground: Ground, log: Log, swept: list[Contender], others: list[Contender], floor_db: float
) -> dict[str, Any]:
    """Everything that is kept of a race."""
    rows = summaries([*swept, *others], log, "race")
    tried = summaries(swept, log, "sweep")
    families = dict.fromkeys(contender.family for contender in swept)
    return {
        "model": ground.model.name,
        "pipeline": ground.pipeline,
        "steps": ground.steps,
        "call": ground.changed,
        "prompts": max((row.get("prompts", 0) for row in rows), default=0),
        "determinism_floor_db": floor_db,
        "commit": commit(),
        "versions": environment.versions(LIBRARIES),
        "machine": environment.machine(),
        "swept": {family: sum(c.family == family for c in swept) for family in families},
        "rows": rows,
        "without_effect": [row for row in tried if "psnr_db" in row and not has_effect(row)],
        "sweep": tried,
        "figures": figures(rows),
    }


def _write(file: Path, name: str, race: dict[str, Any]) -> None:
    """Add a race to the results, in the place of an earlier one of that name."""
    races = json.loads(file.read_text(encoding="utf-8"))["races"] if file.is_file() else {}
    races[name] = race
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {"races": races, "markdown": pages.compact(races)}
    file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
