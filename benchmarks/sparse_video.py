"""Sparse attention, caching and both on the embedded video model.

`python -m benchmarks.sparse_video`: prompts that training has not seen, one CPU thread. A few ways
of rendering at a time run in turns with the dense pipeline, prompt by prompt, so that every ratio
is of neighbours in time. The rival of all, fewer steps, is among them. After each turn the figures
are written to `results/sparse_video.json`, and the same command goes on where the last one stopped.
`--minutes` stops it after a while, `--methods` and `--prompts` limit it. Draws
`docs/images/sparse-video.png`; the table goes into docs/sparse.md by `python -m benchmarks.readme`.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

import blockcache
from benchmarks.presets import commit
from blockcache import recipes
from blockcache.pipelines import models
from blockcache.pipelines.embedded.world_video import held_out_prompts
from blockcache.pipelines.options import quiet_hosts
from blockcache.plan import Recipe
from blockcache.plan.sparse_rule import Sparse
from blockcache.sparse import by_name, names
from blockcache.sparse.rettention import FrameBand
from blockcache.tuning import environment, quality
from blockcache.tuning.stage import Item, Render, Stage, items_of

RESULTS = Path(__file__).resolve().parent / "results" / "sparse_video.json"
PLOT = Path(__file__).resolve().parent.parent / "docs" / "images" / "sparse-video.png"
# Other prompts than those `blockcache compare` shows.
PROMPT_SEED, FIRST_SEED = 7, 1000
# Of 28 steps: three.
DENSE_STEPS = 0.1
PER_TURN = 6
WORTH_IT = 30.0

# Planner to its main knob, the values it is swept over, and what else suits 3,072 tokens: blocks of
# 64 wherever a method leaves the choice.
SWEEPS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "adaspa": ("density", (0.3, 0.15), {}),
    "cubes": ("density", (0.3, 0.15), {}),
    "flash_block": ("kept", (by_name("cubes", density=0.2, centroids=False),), {}),
    "moba": ("density", (0.3, 0.15), {}),
    "nabla": ("tau", (0.9, 0.7), {}),
    "pbs_attn": ("tau", (0.9, 0.7), {"block": 64}),
    "proxy_attn": ("tau", (0.9, 0.7), {"block": 64, "heads": 2}),
    "radial": ("decay", (0.2,), {"block": 64}),
    "rettention": ("kept", (FrameBand(density=0.2, block=32),), {}),
    "sparge": ("amount", (0.3, 0.15), {"block_q": 64}),
    # Tiles of a whole frame: the window is the nearest frames.
    "sta": ("sides", ((5, 1, 1), (3, 1, 1)), {"tile": (1, 16, 16)}),
    "svg1": ("density", (0.3, 0.15), {"block": 64}),
    "svg2": ("tau", (0.9,), {"query_clusters": 24, "key_clusters": 96}),
    "svg_ear": ("tau", (0.9,), {"query_clusters": 24, "key_clusters": 96}),
    "vmoba": (
        "density",
        ((0.5, 0.3, 0.25), (0.3, 0.16, 0.1)),
        {"patch": (4, 4), "box": (4, 4, 4)},
    ),
    "xattention": ("tau", (0.9, 0.7), {"block": 64}),
}
# Cubes of one frame, and no means for what is left out.
_PATCHES = {"cube": (1, 8, 8), "centroids": False}
_NEAR = by_name("sta", sides=(3, 1, 1), tile=(1, 16, 16))
_BUDGETS, _STEPS = (0.7, 0.5, 0.39, 0.32, 0.25), (20, 14, 10, 7)
# Three of this model's layers place the pattern, which takes all frames; and so do its early steps.
_FAR_LAYERS = {"dense_layers": (2, 3, 6)}
_PLACED = {**_FAR_LAYERS, "dense_layers_steps": 18}
_FAR: tuple[tuple[str, dict[str, Any]], ...] = (
    ("8 steps", {"dense_steps": 8}),
    ("layers 2, 3, 6 and 4 steps", {"dense_steps": 4, **_FAR_LAYERS}),
    ("layers 2, 3, 6 and 2 steps", {"dense_steps": 2, **_FAR_LAYERS}),
    ("layers 2, 3, 6 in 18 steps and 4 steps", {"dense_steps": 4, **_PLACED}),
    ("layers 2, 3, 6 in 18 steps and 2 steps", {"dense_steps": 2, **_PLACED}),
    (
        "layers 2, 3, 6 in 16 steps and 3 steps",
        {"dense_steps": 3, **_FAR_LAYERS, "dense_layers_steps": 16},
    ),
)


@dataclass(frozen=True)
class Way:
    """A way of rendering.

    kind: "sparse", "caching", "both" or "fewer steps". steps: where they differ from the model's.
    """

    kind: str
    method: str
    setting: str
    recipe: Recipe | None = None
    steps: int | None = None

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.method} {self.setting}"

    def within(self, pipe: Any) -> AbstractContextManager[Any]:
        """The pipeline as it is to render, inside a `with` block."""
        return nullcontext() if self.recipe is None else blockcache.enabled(pipe, self.recipe)


def all_ways() -> list[Way]:
    """Everything that is measured."""
    missing = sorted(set(names()) - set(SWEEPS))
    if missing:
        raise click.ClickException(f"no sweep for {', '.join(missing)}")
    ways = []
    for name, (knob, values, settings) in SWEEPS.items():
        for value in values:
            rule = Sparse(by_name(name, **settings, **{knob: value}), dense_steps=DENSE_STEPS)
            ways.append(_thinned(name, f"{knob}={_shown(value)}", rule))
    for words, settings in _FAR:
        ways.append(_thinned("sta, partly dense", words, Sparse(_NEAR, **settings)))
    words, settings = _FAR[1]
    rule = Sparse(by_name("adaspa", density=0.25, row_step=2, searches=()), **settings)
    ways.append(_thinned("adaspa, partly dense", f"density=0.25, {words}", rule))
    for density in (0.3, 0.15):
        rule = Sparse(by_name("cubes", density=density, **_PATCHES), dense_steps=DENSE_STEPS)
        ways.append(_thinned("patches", f"density={density}", rule))
    for budget in (0.5, 0.32):
        ways.append(Way("caching", "geometric", f"budget={budget}", recipes.geometric(budget)))
    for budget in _BUDGETS:
        alone = recipes.corrected(budget)
        rule = Sparse(_NEAR, dense_steps=2, **_FAR_LAYERS)
        both = replace(alone, name="corrected + sta", sparse=rule)
        ways.append(Way("caching", "corrected", f"budget={budget}", alone))
        ways.append(Way("both", both.name, f"budget={budget}", both))
    for steps in _STEPS:
        ways.append(Way("fewer steps", "fewer steps", f"{steps}", steps=steps))
    return ways


def _thinned(method: str, setting: str, rule: Sparse) -> Way:
    return Way("sparse", method, setting, Recipe(name=method, sparse=rule))


def _shown(value: Any) -> str:
    if hasattr(value, "density"):
        return f"{type(value).__name__} {value.density}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def turns(
    ways: Sequence[Way], items: Sequence[Item], known: dict[str, Any]
) -> Iterator[tuple[int, list[Way]]]:
    """What is still to be rendered: number of the item, and a few ways."""
    for number in range(len(items)):
        left = [w for w in ways if str(number) not in known.get(w.key, {}).get("items", {})]
        for at in range(0, len(left), PER_TURN):
            yield number, left[at : at + PER_TURN]


def one_turn(stage: Stage, item: Item, ways: Sequence[Way], is_reversed: bool) -> dict[str, Any]:
    """Dense and every way once, by turns one way round and the other; figures by key."""
    order = [Way("dense", "dense", ""), *ways]
    found = {}
    for way in reversed(order) if is_reversed else order:
        with way.within(stage.pipe):
            before = time.process_time()
            made = stage.render(item, way.steps)
            cpu_s = time.process_time() - before
            summary = blockcache.summary(stage.pipe).as_dict() if way.recipe else {}
        found[way.key] = Run(made, cpu_s, summary)
    dense = found.pop(order[0].key)
    return {key: _figures(run, dense) for key, run in found.items()}


class Run(NamedTuple):
    """One render, the processor's seconds for it, and what the cache says about it."""

    made: Render
    cpu_s: float
    summary: dict[str, Any]


def _figures(run: Run, dense: Run) -> dict[str, Any]:
    if run.made.picture is None or dense.made.picture is None:
        raise RuntimeError("a render without a picture")
    scores = quality.scores(run.made.picture, dense.made.picture)
    summary = run.summary
    attention = summary.get("attention") or {}
    return {
        "dense_s": dense.made.seconds,
        "seconds": run.made.seconds,
        "dense_cpu_s": dense.cpu_s,
        "cpu_s": run.cpu_s,
        "psnr_db": scores.psnr_db,
        "worst_frame_db": scores.worst_frame_db,
        "ssim": scores.ssim,
        "motion_db": scores.motion_db,
        "flicker": scores.flicker,
        "density": attention.get("density"),
        "recall": attention.get("recall"),
        "planning_s": attention.get("planning_s"),
        "dense_calls": attention.get("dense_calls"),
        "computed": 1 - summary["skipped_fraction"] if summary else 1.0,
    }


def point(entry: dict[str, Any]) -> dict[str, Any]:
    """Median and worst of what was measured of one way."""
    items = list(entry["items"].values())

    def middle(name: str) -> float | None:
        known = [item[name] for item in items if item[name] is not None]
        return statistics.median(known) if known else None

    return {
        **{name: entry[name] for name in ("kind", "method", "setting")},
        "prompts": len(items),
        "speedup": statistics.median(item["dense_s"] / item["seconds"] for item in items),
        "cpu_speedup": statistics.median(item["dense_cpu_s"] / item["cpu_s"] for item in items),
        "psnr_db": {"median": middle("psnr_db"), "worst": min(i["psnr_db"] for i in items)},
        "worst_frame_db": min(item["worst_frame_db"] for item in items),
        **{name: middle(name) for name in ("motion_db", "flicker", "density", "recall")},
    }


COLUMNS = (
    "", "setting", "prompts", "speed-up", "CPU time", "PSNR dB, median / worst", "worst frame",
    "motion dB", "flicker", "density", "recall",
)  # fmt: skip


def table(points: Sequence[dict[str, Any]]) -> str:
    """Markdown, one row per way; bold where no other is both faster and better in the median."""
    rows = [COLUMNS, ("---", "---", *["--:"] * (len(COLUMNS) - 2))]
    for p in points:
        median, worst = (p["psnr_db"][which] for which in ("median", "worst"))
        beaten = any(
            q["speedup"] > p["speedup"] and q["psnr_db"]["median"] > median for q in points
        )
        shown = f"{median:.1f}" if beaten else f"**{median:.1f}**"
        figures = (p["motion_db"], p["flicker"], p["density"], p["recall"])
        rows.append(
            (
                p["method"], p["setting"], str(p["prompts"]), f"{p['speedup']:.2f}x",
                f"{p['cpu_speedup']:.2f}x",
                f"{shown} / {worst:.1f}", f"{p['worst_frame_db']:.1f}",
                *(_number(x, digits) for x, digits in zip(figures, (1, 2, 2, 2), strict=True)),
            )
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def draw(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Speed against quality, median and worst prompt, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(14, 6.5), sharex=True)
    styles = {"sparse": "-", "caching": "-.", "both": "-", "fewer steps": "--"}
    thick = {"caching": 2.0, "both": 2.5, "fewer steps": 2.0}
    own = {
        "geometric": "#d55e00", "corrected": "#009e73", "corrected + sta": "#000000",
        "sta, partly dense": "#0072b2", "fewer steps": "#777777",
    }  # fmt: skip
    methods = list(dict.fromkeys(p["method"] for p in points))
    for panel, which in zip(panels, ("median", "worst"), strict=True):
        for i, method in enumerate(methods):
            line = sorted((p for p in points if p["method"] == method), key=lambda p: p["speedup"])
            kind = line[0]["kind"]
            panel.plot(
                [p["speedup"] for p in line],
                [p["psnr_db"][which] for p in line],
                marker="osD^v<>ph*X"[i % 11],
                color=own.get(method, pyplot.get_cmap("tab20")(i % 20)),
                linestyle=styles[kind],
                linewidth=thick.get(kind, 1.0),
                markersize=5,
                label=method,
            )
        panel.axhline(WORTH_IT, color="#bbbbbb", linewidth=0.8, zorder=0)
        panel.axvline(1.5, color="#bbbbbb", linewidth=0.8, zorder=0)
        panel.set_xlabel("speed-up, wall time of the whole pipeline")
        panel.set_ylabel(f"PSNR against the dense video, {which} prompt, dB")
        panel.grid(alpha=0.3)
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def setup(model: models.Model, call: dict[str, Any]) -> dict[str, Any]:
    """What all figures of one file have in common; others do not go into it."""
    weights = hashlib.sha256()
    for file in sorted(Path(model.source).glob("*/*.safetensors")):
        weights.update(file.read_bytes())
    return {
        "model": model.name,
        "weights": weights.hexdigest()[:16],
        "call": call,
        "dense_steps": DENSE_STEPS,
        "versions": environment.versions(),
        "machine": environment.machine(torch.device("cpu")),
    }


def load(file: Path, common: dict[str, Any]) -> dict[str, Any]:
    """What was measured before, by key.

    Raises:
        ClickException: something else was measured.
    """
    if not file.is_file():
        return {}
    data = json.loads(file.read_text(encoding="utf-8"))
    differing = [name for name in common if data["setup"].get(name) != common[name]]
    if differing:
        raise click.ClickException(
            f"{file} has figures of another {', '.join(differing)}; move it away, or give --json"
        )
    current = {way.key for way in all_ways()}
    # A way that is not measured any more leaves the table.
    return {key: entry for key, entry in data["ways"].items() if key in current}


def save(file: Path, common: dict[str, Any], ways: dict[str, Any]) -> list[dict[str, Any]]:
    """Write the figures and the table; the points."""
    points = [point(entry) for entry in ways.values() if entry["items"]]
    about = (
        f"{common['model']}, {common['call']['num_inference_steps']} steps of which the first "
        f"{common['dense_steps']:.0%} are dense unless it says otherwise, held-out prompts, "
        f"one thread; commit {commit()}"
    )
    text = f"{table(points)}\n\n*{about}*"
    data = {
        "commit": commit(), "setup": common, "points": points, "ways": ways, "markdown": text
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(file)
    return points


@click.command()
@click.option("--model", "name", default="tiny-video", show_default=True, help="Name or folder.")
@click.option("--prompts", type=click.IntRange(1), default=4, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Of the dense run; the model's own if none.")
@click.option("--methods", help="Names with commas between; all if none.")
@click.option("--minutes", type=float, help="Begin nothing new after that many.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--plot", type=click.Path(path_type=Path), default=PLOT)
def main(
    name: str,
    prompts: int,
    steps: int | None,
    methods: str | None,
    minutes: float | None,
    file: Path,
    plot: Path,
) -> None:
    """Measure, and write JSON, table and plot."""
    started = time.monotonic()
    torch.set_num_threads(1)
    quiet_hosts()
    ways = all_ways()
    if methods is not None:
        wanted = {word.strip() for word in methods.split(",")}
        unknown = sorted(wanted - {way.method for way in ways})
        if unknown:
            every = ", ".join(dict.fromkeys(way.method for way in ways))
            raise click.ClickException(f"unknown {', '.join(unknown)} (known: {every})")
        ways = [way for way in ways if way.method in wanted]
    model = models.find(name)
    call = model.call | ({} if steps is None else {"num_inference_steps": steps})
    common = setup(model, call)
    known = load(file, common)
    stage = Stage(models.load(model, torch.device("cpu")), call)
    items = items_of(
        held_out_prompts(prompts, PROMPT_SEED), range(FIRST_SEED, FIRST_SEED + prompts)
    )
    _warm_up(stage, items[0])
    for count, (number, some) in enumerate(turns(ways, items, known)):
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            click.echo("time is up; the same command goes on from here")
            break
        for key, figures in one_turn(stage, items[number], some, bool(count % 2)).items():
            way = next(way for way in some if way.key == key)
            entry = {"kind": way.kind, "method": way.method, "setting": way.setting, "items": {}}
            known.setdefault(key, entry)["items"][str(number)] = figures
            speed, db = figures["dense_s"] / figures["seconds"], figures["psnr_db"]
            click.echo(f"prompt {number}  {key:45} {speed:5.2f}x  {db:5.1f} dB")
        save(file, common, known)
    points = save(file, common, known)
    click.echo(table(points))
    if points:
        draw(points, plot)


def _warm_up(stage: Stage, item: Item) -> None:
    """Two steps, dense and sparse: what is made once is not timed."""
    rule = Sparse(by_name("cubes"), dense_steps=0, dense_layers=0)
    with blockcache.enabled(stage.pipe, Recipe(sparse=rule)):
        stage.render(item, 2)
    stage.render(item, 2)


if __name__ == "__main__":
    main()
