"""What batch generation costs and how it scales: `python -m benchmarks.batch`.

* overhead: `generate` over a bare loop that renders the same items and saves the same PNGs, item
  by item in turns in one process on the embedded model;
* two processes over one, one thread each;
* what a claim costs;
* a simulation of 8, 64 and 512 workers from the measured seconds of uneven items: claimed one by
  one as `generate` does it, against shares split beforehand.
"""

import heapq
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import blockcache
from benchmarks.readme import filled
from blockcache.pipelines import models
from blockcache.pipelines.embedded.world import held_out_prompts
from blockcache.pipelines.generate import claims, generate
from blockcache.pipelines.options import quiet_hosts
from blockcache.tuning import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "batch.json"
PAGE = ROOT / "docs" / "batch.md"
# Uneven work: steps of a row, by turns.
STEPS = (10, 20, 50, 80)
SCALED = 24
"""Items of two processes over one."""
OVERHEAD_LIMIT, SPEEDUP_LIMIT = 0.02, 1.7
_WARM_UP, _SETTLES_S = 4, 0.05


# ---- overhead -----------------------------------------------------------------------------------


def overhead(items: int) -> dict[str, Any]:
    """Seconds per item of a bare loop, and what `generate` adds, by the clock and of CPU time.

    The two take turns item by item, each on a pipeline of its own, and an item of `generate` is
    compared with the bare ones before and after it: the machine's pace changes from minute to
    minute by more than what is measured. The median over all items counts.
    """
    model = models.find("tiny-image")
    first, second = (models.load(model, torch.device("cpu")) for _ in range(2))
    prompts = held_out_prompts(items, seed=3)
    with tempfile.TemporaryDirectory() as place, blockcache.enabled(first, "balanced"):
        file, out = Path(place) / "bare.png", Path(place) / "out"

        def bare(seed: int, prompt: str) -> None:
            generator = torch.Generator().manual_seed(seed)
            first(prompt, generator=generator, **model.call).images[0].save(file)

        results = _generated(second, model.call, prompts, out)
        bares, ours = [], []
        for seed, prompt in enumerate(prompts):
            bares.append(_timed(lambda at=(seed, prompt): bare(*at)))
            ours.append(_timed(lambda: next(results)))
        pages = _timed(lambda: next(results, None))
    # Both warm up first. At the first result `generate` has begun two items, at the last none.
    within = range(_WARM_UP, items - 1)
    found: dict[str, Any] = {"items": items}
    for i, kind in enumerate(("wall", "cpu")):
        around = [(bares[n][i] + bares[n + 1][i]) / 2 for n in within]
        ratios = [ours[n][i] / base - 1 for n, base in zip(within, around, strict=True)]
        found[f"bare_{kind}_s"] = statistics.median(around)
        found[f"overhead_{kind}"] = statistics.median(ratios)
        found[f"overhead_{kind}_quartiles"] = statistics.quantiles(ratios, n=4)
        found[f"pages_{kind}"] = pages[i] / (items * found[f"bare_{kind}_s"])
    return found


def _generated(pipe: Any, call: dict[str, Any], prompts: list[str], out: Path) -> Iterator[Any]:
    settings = {"height": call["height"], "width": call["width"]}
    rest = {k: v for k, v in call.items() if k not in settings}
    return generate(prompts, pipe, out, arguments=rest, **settings)


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock until `work` returns, and of CPU time until all it set off is over."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    elapsed = time.perf_counter() - wall
    # `generate` saves in a second thread while the next item is rendered, here by the other side.
    time.sleep(_SETTLES_S)
    return elapsed, time.process_time() - cpu


# ---- two processes ------------------------------------------------------------------------------


def scaling(items: int, rounds: int) -> dict[str, Any]:
    """Items per second of two processes over one, and the seconds of every item of one."""
    with tempfile.TemporaryDirectory() as place:
        prompts = Path(place) / "prompts.jsonl"
        rows = zip(held_out_prompts(items, seed=4), itertools.cycle(STEPS), strict=False)
        lines = (json.dumps({"prompt": prompt, "steps": steps}) for prompt, steps in rows)
        prompts.write_text("\n".join(lines))
        ratios, seconds = [], []
        for number in range(rounds):
            alone, times = _rate(prompts, Path(place) / f"{number}-1", 1)
            together, _ = _rate(prompts, Path(place) / f"{number}-2", 2)
            ratios.append(together / alone)
            seconds.append(times)
    quietest = min(seconds, key=sum)
    return {
        "ratios": ratios,
        "speedup": statistics.median(ratios),
        "best": max(ratios),
        "item_seconds": quietest,
        "load_average": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
    }


def _rate(prompts: Path, out: Path, processes: int) -> tuple[float, list[float]]:
    """Work per second while all processes are at it, in steps; and seconds by item."""
    command = [sys.executable, "-m", "blockcache", "generate", "--prompts", str(prompts)]
    given = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, "--out", str(out)],
            cwd=ROOT,
            env={**given, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(processes)
    ]
    if any(process.wait() for process in running):
        raise click.ClickException("a process failed")
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    of_rank = [[row for row in rows if row["rank"] == rank] for rank in range(processes)]
    if not all(of_rank):
        raise click.ClickException("a process came too late to do anything; take more --items")
    # From when the last one is warm to when the first one runs out of work.
    begin = max(min(row["finished"] for row in mine) for mine in of_rank)
    end = min(max(row["finished"] for row in mine) for mine in of_rank)
    steps = sum(r["settings"]["num_inference_steps"] for r in rows if begin < r["finished"] <= end)
    return steps / (end - begin), [row["seconds"] for row in rows]


def item_seconds(items: int) -> list[float]:
    """CPU seconds of uneven items in one process."""
    model = models.find("tiny-image")
    pipe = models.load(model, torch.device("cpu"))
    found = []
    for prompt, steps in zip(held_out_prompts(items, seed=4), itertools.cycle(STEPS), strict=False):
        started = time.process_time()
        with blockcache.enabled(pipe, "balanced"):
            pipe(prompt, **{**model.call, "num_inference_steps": steps})
        found.append(time.process_time() - started)
    return found


def claim_us(rows: int = 20_000) -> float:
    """Microseconds to claim and settle one row."""
    with tempfile.TemporaryDirectory() as place:
        book = claims.Claims(Path(place) / "state")
        book.enter("0" * 32, lambda: bytes(rows))
        started = time.perf_counter()
        while (row := book.take()) is not None:
            book.settle(row, claims.DONE)
        elapsed = time.perf_counter() - started
        book.close()
    return elapsed / rows * 1e6


# ---- simulation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What goes wrong. Times in mean items.

    slow: share of the workers that run at a third of the speed. between_deaths: mean time to a
    worker's death. repair: until it is back with its model loaded.
    """

    slow: float = 0.05
    between_deaths: float = 200.0
    repair: float = 20.0


@dataclass
class Outcome:
    """Shares of all workers' time from the first start to the last end."""

    idle: float
    lost: float
    down: float
    slowdown: float
    """Time taken over that of as much perfectly divided work without deaths."""


class _Worker:
    def __init__(self, world: World, chance: random.Random) -> None:
        self.pace = 3.0 if chance.random() < world.slow else 1.0
        self.world, self.chance = world, chance
        self.dies = chance.expovariate(1 / world.between_deaths)
        self.worked = self.lost = self.down = 0.0

    def work(self, now: float, item: float) -> tuple[float, bool]:
        """When the item is over, and whether it was finished and not lost."""
        end = now + item * self.pace
        if end <= self.dies:
            self.worked += end - now
            return end, True
        died = max(self.dies, now)
        self.lost += died - now
        self.dies = (
            died + self.world.repair + self.chance.expovariate(1 / self.world.between_deaths)
        )
        return died, False


def claimed(items: list[float], count: int, world: World, chance: random.Random) -> Outcome:
    """Workers take the next item when they are free; a dead one's item is free at once.

    Who finds nothing leaves, but for worker 0, which stays until everything is settled.
    """
    workers = [_Worker(world, chance) for _ in range(count)]
    todo, lost = deque(items), deque[float]()
    # (time, order, worker, what was lost at that time)
    order = itertools.count()
    events: list[tuple[float, int, int, float]] = [(0.0, next(order), w, 0.0) for w in range(count)]
    heapq.heapify(events)
    left, last, waits = len(items), 0.0, False
    while left:
        now, _, number, freed = heapq.heappop(events)
        worker = workers[number]
        if freed:
            lost.append(freed)
            back = now + world.repair
            worker.down += world.repair
            heapq.heappush(events, (back, next(order), number, 0.0))
            if not waits:
                continue
            number, worker, waits = 0, workers[0], False
        if not todo and not lost:
            waits = waits or number == 0
            continue
        item = todo.popleft() if todo else lost.popleft()
        end, is_done = worker.work(now, item)
        heapq.heappush(events, (end, next(order), number, 0.0 if is_done else item))
        if is_done:
            left -= 1
            last = max(last, end)
    return _outcome(workers, items, last)


def split(items: list[float], count: int, world: World, chance: random.Random) -> Outcome:
    """Every worker has its share from the beginning, and goes on with it when it is back."""
    workers = [_Worker(world, chance) for _ in range(count)]
    last = 0.0
    for number, worker in enumerate(workers):
        now = 0.0
        # Contiguous shares, as `split_between_processes` gives them.
        share = items[number * len(items) // count : (number + 1) * len(items) // count]
        for item in share:
            is_done = False
            while not is_done:
                now, is_done = worker.work(now, item)
                if not is_done:
                    worker.down += world.repair
                    now += world.repair
        last = max(last, now)
    return _outcome(workers, items, last)


def _outcome(workers: list[_Worker], items: list[float], last: float) -> Outcome:
    everything = len(workers) * last
    worked, lost, down = (
        sum(getattr(worker, name) for worker in workers) for name in ("worked", "lost", "down")
    )
    speed = sum(1 / worker.pace for worker in workers)
    idle = max(0.0, 1 - (worked + lost + down) / everything)
    return Outcome(idle, lost / everything, down / everything, last * speed / sum(items))


def simulated(seconds: list[float], items: int, repeats: int = 5) -> list[dict[str, Any]]:
    """Both ways with 8, 64 and 512 workers; the mean of some repeats."""
    mean = statistics.fmean(seconds)
    found = []
    for count in (8, 64, 512):
        row: dict[str, Any] = {"workers": count, "items": items}
        for name, way in (("claimed", claimed), ("split", split)):
            outcomes = []
            for seed in range(repeats):
                chance = random.Random(seed)
                drawn = [chance.choice(seconds) / mean for _ in range(items)]
                outcomes.append(way(drawn, count, World(), chance))
            row[name] = {
                figure: statistics.fmean(getattr(outcome, figure) for outcome in outcomes)
                for figure in ("idle", "lost", "down", "slowdown")
            }
        found.append(row)
    return found


# ---- tables -------------------------------------------------------------------------------------


def markdown(found: dict[str, Any]) -> str:
    """The tables for the documentation."""
    cost, two = found["overhead"], found["scaling"]
    measured = [
        "| measured on the embedded model | by the clock | CPU time | limit |",
        "|---|--:|--:|--:|",
        f"| bare loop, seconds per item | {cost['bare_wall_s']:.3f} | {cost['bare_cpu_s']:.3f} | |",
        f"| `generate` over the bare loop, median of {cost['items']} items "
        f"| {cost['overhead_wall']:+.1%} | {cost['overhead_cpu']:+.1%} | +{OVERHEAD_LIMIT:.0%} |",
        "| manifest, contact sheet and gallery at the end "
        f"| {cost['pages_wall']:+.1%} | {cost['pages_cpu']:+.1%} | |",
        f"| claiming and settling a row, µs | {found['claim_us']:.0f} | | |",
    ]
    if two is not None:
        measured.append(
            f"| two processes over one, median of {len(two['ratios'])} "
            f"| {two['speedup']:.2f}x | | {SPEEDUP_LIMIT}x |"
        )
    simulation = [
        "| workers | items each | idle, claimed | idle, split | time over ideal, claimed "
        "| time over ideal, split | lost, claimed |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["simulation"]:
        ours, theirs = row["claimed"], row["split"]
        simulation.append(
            f"| {row['workers']} | {row['items'] // row['workers']} | {ours['idle']:.1%} "
            f"| {theirs['idle']:.1%} | {ours['slowdown']:.2f} | {theirs['slowdown']:.2f} "
            f"| {ours['lost']:.2%} |"
        )
    return "\n".join([*measured, "", *simulation])


@click.command()
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
@click.option("--items", default=160, show_default=True, help="Of the overhead.")
@click.option("--rounds", default=5, show_default=True, help="Of two processes over one.")
@click.option(
    "--scaling/--no-scaling",
    "with_scaling",
    default=True,
    help="Two processes over one: needs two cores that nobody else uses.",
)
@click.option("--simulated-items", default=20_000, show_default=True)
def main(file: Path, items: int, rounds: int, with_scaling: bool, simulated_items: int) -> None:
    """Measure, simulate, print the tables and write them as JSON."""
    torch.set_num_threads(1)
    quiet_hosts()
    found: dict[str, Any] = {
        "versions": environment.versions(),
        "machine": environment.machine("cpu"),
        "overhead": overhead(items),
        "scaling": scaling(SCALED, rounds) if with_scaling else None,
        "claim_us": claim_us(),
    }
    seconds = found["scaling"]["item_seconds"] if with_scaling else item_seconds(SCALED)
    found["simulation"] = simulated(seconds, simulated_items)
    found["markdown"] = markdown(found)
    click.echo(found["markdown"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if file == RESULTS:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), RESULTS.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
