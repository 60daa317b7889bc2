"""The report: one self-contained page, and its figures as PNGs, on what a plan does to pictures.

The prompts are run with and without the plan while the latents are kept after every step. No
server, no network: the page opens offline. Needs matplotlib; jinja2 comes with torch.
"""

import base64
import io
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from blockcache import api
from blockcache.errors import BlockCacheError
from blockcache.plan import Plan
from blockcache.plan.trace import Floats, SiteTrace, Trace
from blockcache.tuning import quality
from blockcache.tuning.comparison import Picture
from blockcache.tuning.scoring import RUNS, rows_of
from blockcache.tuning.stage import Item, Render, Stage, items_of
from blockcache.tuning.trace import trace_items

_MOST_PAIRS = 8
_TRACED = 2
_DIFFERENCE_GAIN = 4.0
_COMPUTED, _REUSED, _LINE = "#1f4e79", "#dfe8f0", "#c0504d"

Figure: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class Pair:
    """One item with and without the plan. true_db: `[T]`, distance of the latents per step."""

    item: Item
    uncached: Picture
    cached: Picture
    psnr_db: float
    true_db: Floats
    uncached_s: float
    cached_s: float


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything the page shows. candidates: rows (label, speed-up, median distance in dB)."""

    plan: Plan
    trace: Trace
    pairs: tuple[Pair, ...]
    summary: dict[str, Any]
    candidates: tuple[tuple[str, float, float], ...]

    @property
    def computed(self) -> NDArray[np.bool_]:
        """`[blocks, steps]`, True where the first branch computed."""
        by_step = np.asarray(self.summary["branches"][0]["map"], dtype=np.bool_)
        return np.asarray(by_step.T)

    @property
    def worst_first(self) -> list[Pair]:
        """The pairs, the farthest from its uncached twin first."""
        return sorted(self.pairs, key=lambda pair: pair.psnr_db)

    @property
    def speedup(self) -> float:
        """Median of the uncached seconds over that of the cached."""
        plain = statistics.median(pair.uncached_s for pair in self.pairs)
        return plain / statistics.median(pair.cached_s for pair in self.pairs)


def report(
    pipe: Any,
    plan: Plan,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    out: str | Path = "report",
    *,
    work: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **call_kwargs: Any,
) -> Path:
    """Write `index.html` and its figures to the folder `out`; returns the page.

    Args:
        pipe: The pipeline; left disabled.
        plan: What to report on.
        prompts: At most 8 are shown.
        seeds: One per prompt; 0, 1, ... if None.
        out: The folder.
        work: The folder of the tuning that found the plan; every candidate it tried is then drawn.
        on_progress: Called with (runs done, runs in all).
        call_kwargs: Passed to every pipeline call.

    Raises:
        BlockCacheError: matplotlib is missing, no prompts, or impossible arguments.
        PlanMismatchError: the plan was made for another model.
    """
    _pyplot()
    items = items_of(prompts, seeds)[:_MOST_PAIRS]
    stage = Stage(pipe, call_kwargs, "report")
    runs = None if work is None else Path(work) / RUNS
    if runs is not None and not runs.is_file():
        raise BlockCacheError(f"no tuning in {work}: {runs.name} is missing")
    found = _find(stage, plan, items, runs, on_progress)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: _png(draw(found)) for name, draw in _FIGURES.items()}
    for name, data in drawn.items():
        (folder / f"{name}.png").write_bytes(data)
    page = folder / "index.html"
    page.write_text(_page(found, drawn), encoding="utf-8")
    return page


# ---- finding out --------------------------------------------------------------------------------


def _find(
    stage: Stage,
    plan: Plan,
    items: Sequence[Item],
    runs: Path | None,
    on_progress: Callable[[int, int], None] | None,
) -> Findings:
    with api.enabled(stage.pipe, plan):
        # Refused before anything is run.
        pass
    report_done = on_progress or (lambda done, total: None)
    total = 2 * len(items) + 1
    traced = trace_items(stage, items[:_TRACED], None, ("model", "stack"))
    report_done(1, total)
    pairs, summary = [], {}
    for i, item in enumerate(items):
        plain = stage.full(item, every_step=True)
        report_done(2 * i + 2, total)
        with api.enabled(stage.pipe, plan):
            cached = stage.full(item, every_step=True)
            summary = api.summary(stage.pipe).as_dict()
        report_done(2 * i + 3, total)
        pairs.append(_pair(item, plain, cached))
    tried = () if runs is None else _candidates(runs, traced)
    return Findings(plan, traced, tuple(pairs), summary, tried)


def _pair(item: Item, plain: Render, cached: Render) -> Pair:
    if plain.picture is None or cached.picture is None:
        raise RuntimeError("a render without a picture")
    distances = [
        quality.relative_l2(ours, theirs)
        for ours, theirs in zip(cached.early, plain.early, strict=True)
    ]
    return Pair(
        item,
        plain.picture,
        cached.picture,
        quality.psnr(cached.picture, plain.picture),
        -20 * np.log10(np.maximum(distances, 1e-6)),
        plain.seconds,
        cached.seconds,
    )


def _candidates(file: Path, traced: Trace) -> tuple[tuple[str, float, float], ...]:
    """The masks a tuning tried on all its items, with their speed by the milliseconds measured."""
    tried: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(file):
        if row.get("what") == "latents":
            tried.setdefault(row["mask"], []).append(row)
    most = max((len(rows) for rows in tried.values()), default=0)
    run_ms = traced.milliseconds["run"]
    return tuple(
        (
            rows[0]["recipe"],
            run_ms / (1e3 * statistics.median(row["seconds"] for row in rows)),
            statistics.median(row["db"] for row in rows),
        )
        for rows in tried.values()
        if len(rows) == most
    )


def _estimated_db(found: Findings) -> Floats:
    """`[T]`: distance of the predicted payload from the true one, teacher-forced; NaN if computed.

    For the plan's first rule, on the traced prompts.
    """
    rule, steps = found.plan.recipe.rules[0], found.trace.steps
    site = _site_of(found)
    schedule = rule.schedule(steps, len(rule.site.units(found.trace.layout)))
    estimated = np.full(len(steps), np.nan)
    anchors: list[int] = []
    for t, asked in enumerate(schedule[0] if schedule else ()):
        if asked:
            anchors.insert(0, t)
            continue
        places = [steps[a] for a in anchors[: rule.predictor.depth]]
        weights = rule.predictor.weights(steps[t], places)
        errors = site.errors(t, anchors[: len(weights)], weights) / site.gram[:, t, t]
        estimated[t] = -10 * np.log10(max(float(errors.mean()), 1e-12))
    return estimated


def _site_of(found: Findings) -> SiteTrace:
    rule = found.plan.recipe.rules[0]
    if rule.site.scope == "model":
        return found.trace.at("model", 0, "output")
    return found.trace.at("stack", 0, rule.payload)


# ---- drawing ------------------------------------------------------------------------------------


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise BlockCacheError("the report needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _axes(height: float = 2.6) -> tuple[Figure, Any]:
    figure, axes = _pyplot().subplots(figsize=(8.0, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_map(found: Findings) -> Figure:
    from matplotlib.colors import ListedColormap

    computed = found.computed
    figure, axes = _axes(1.2 + 0.08 * len(computed))
    colours = ListedColormap([_REUSED, _COMPUTED])
    axes.imshow(computed, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="step", ylabel="block", title="computed (dark) and reused blocks")
    return figure


def _draw_change(found: Findings) -> Figure:
    figure, axes = _axes()
    steps = np.arange(len(found.trace.sigmas))
    for label, site, style in (
        ("residual of the stack", found.trace.at("stack"), "-"),
        ("output of the model", found.trace.at("model", 0, "output"), "--"),
    ):
        axes.plot(steps[1:], site.change()[1:], style, color=_COMPUTED, label=label)
    for t in np.flatnonzero(found.computed.any(0)):
        axes.axvline(t, color=_LINE, lw=0.6, alpha=0.5)
    axes.set(xlabel="step", ylabel="relative L1 change", yscale="log")
    axes.set_title("change from the step before, uncached (red: the plan computes)")
    axes.legend(frameon=False)
    return figure


def _draw_errors(found: Findings) -> Figure:
    figure, axes = _axes(3.0)
    steps = np.arange(len(found.trace.sigmas))
    worst = found.worst_first[0]
    for pair in found.pairs:
        is_worst = pair is worst
        colour = _LINE if is_worst else "#9aa7b3"
        label = "latents, worst prompt" if is_worst else None
        axes.plot(steps[: len(pair.true_db)], pair.true_db, color=colour, lw=1.2, label=label)
    axes.plot(
        steps, _estimated_db(found), ".", color=_COMPUTED, label="predicted payload, estimate"
    )
    # Before anything is reused there is no error; its 120 dB would only squeeze the rest.
    axes.set(xlabel="step", ylabel="distance, dB (more is nearer)", ylim=(0, 80))
    axes.set_title("true error of the latents after every step, and the estimate from the trace")
    axes.legend(frameon=False)
    return figure


def _draw_time(found: Findings) -> Figure:
    figure, axes = _axes(2.0)
    ms, total = found.trace.milliseconds, len(found.trace.sigmas)
    count = float(found.computed.mean()) * total
    blocks = sum(found.trace.block_ms)
    rest = max(0.0, ms["computed"] - blocks - ms["head"])
    parts = {
        "blocks": (total * blocks, count * blocks),
        "rest of the model": (total * ms["head"], count * ms["head"]),
        "sampler and loop": (total * rest, count * rest),
        "reused steps: hooks, prediction, head": (0.0, (total - count) * ms["reused"]),
        "text, decoder": (ms["fixed"], ms["fixed"]),
    }
    left = np.zeros(2)
    shades = ("#1f4e79", "#4f81bd", "#95b3d7", "#c0504d", "#bfbfbf")
    for (label, values), colour in zip(parts.items(), shades, strict=True):
        axes.barh(["uncached", "plan"], values, left=left, color=colour, label=label)
        left += values
    axes.set(xlabel="milliseconds of one call, from the trace")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _draw_front(found: Findings) -> Figure:
    figure, axes = _axes(3.0)
    for _, speed, decibels in found.candidates:
        axes.plot(speed, decibels, ".", color="#9aa7b3")
    final = statistics.median(pair.true_db[-1] for pair in found.pairs)
    axes.plot(found.speedup, final, "*", color=_LINE, ms=14, label="this plan, these prompts")
    axes.set(xlabel="speed-up", ylabel="median distance of the latents, dB")
    axes.set_title(f"{len(found.candidates)} candidates tried" if found.candidates else "this plan")
    axes.legend(frameon=False)
    return figure


def _draw_pairs(found: Findings) -> Figure:
    pairs = found.worst_first
    figure, rows = _pyplot().subplots(
        len(pairs), 3, figsize=(6.6, 2.3 * len(pairs)), layout="constrained", squeeze=False
    )
    for row, pair in zip(rows, pairs, strict=True):
        plain, cached = _still(pair.uncached), _still(pair.cached)
        difference = np.clip(0.5 + _DIFFERENCE_GAIN * (cached - plain) / 2, 0, 1)
        images: tuple[NDArray[Any], ...] = (plain, cached, difference)
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
        prompt = textwrap.shorten(pair.item[0], 90, placeholder="...")
        title = textwrap.fill(f"{prompt} (seed {pair.item[1]}), uncached", 40)
        row[0].set_title(title, fontsize=7)
        row[1].set_title(f"with the plan: {pair.psnr_db:.1f} dB", fontsize=7)
        row[2].set_title(f"difference x {_DIFFERENCE_GAIN / 2:g}", fontsize=7)
    return figure


def _still(picture: Picture) -> Picture:
    """The picture, or the middle frame of a video."""
    return np.clip(picture[len(picture) // 2] if picture.ndim == 4 else picture, 0, 1)


_FIGURES: dict[str, Callable[[Findings], Figure]] = {
    "pairs": _draw_pairs,
    "map": _draw_map,
    "errors": _draw_errors,
    "change": _draw_change,
    "time": _draw_time,
    "front": _draw_front,
}
"""By file name, in the order of the page."""


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    _pyplot().close(figure)
    return buffer.getvalue()


# ---- the page -----------------------------------------------------------------------------------

_TITLES = {
    "pairs": "Pictures, the worst first",
    "map": "What is computed",
    "errors": "Error per step",
    "change": "Change per step",
    "time": "Where the time goes",
    "front": "Speed against quality",
}

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 860px; margin: 2em auto; padding: 0 1em;
       color: #222; }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
img { max-width: 100%; height: auto } table { border-collapse: collapse }
td, th { padding: .15em 1em .15em 0; text-align: left; font-variant-numeric: tabular-nums }
pre { background: #f4f6f8; padding: .8em; white-space: pre-wrap }
</style></head><body>
<h1>{{ name }} on {{ model }}</h1>
<table>
{% for key, value in rows %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
{% if note %}<pre>{{ note }}</pre>{% endif %}
{% for title, file, data in figures %}
<h2>{{ title }}</h2><img alt="{{ title }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
</body></html>
"""


def _page(found: Findings, drawn: dict[str, bytes]) -> str:
    from jinja2 import Environment

    decibels = [pair.psnr_db for pair in found.pairs]
    worst = found.worst_first[0]
    rows = [
        ("pictures", len(found.pairs)),
        ("PSNR median / worst", f"{statistics.median(decibels):.1f} / {min(decibels):.1f} dB"),
        ("worst", f"{worst.item[0]} (seed {worst.item[1]})"),
        ("speed-up, whole call", f"{found.speedup:.2f}x"),
        ("blocks computed", f"{found.computed.mean():.0%}"),
        ("memory of the cache", f"{found.summary['cache_bytes'] / 2**20:.2f} MiB"),
        ("steps", len(found.trace.sigmas)),
    ]
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    figures = [
        (_TITLES[name], f"{name}.png", base64.b64encode(data).decode())
        for name, data in drawn.items()
    ]
    return template.render(
        name=found.plan.recipe.name,
        model=found.plan.fingerprint.model,
        rows=rows,
        note=found.plan.note,
        figures=figures,
    )
