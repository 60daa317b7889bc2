"""Every recipe over its main knob on the embedded image model: `python -m benchmarks.recipes`.

16 prompts that no training and no calibration has seen, 50 steps, one CPU thread; all settings of a
recipe are rendered in turns with the uncached pipeline, and so are the plain runs with fewer steps.
Calibrated recipes work from a trace of 8 other prompts. Writes `results/recipes.json` (with the
table for docs/methods.md), and the plot. `--only NAME` measures some recipes and keeps the others.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

import blockcache
from benchmarks.presets import FIRST_SEED, PROMPT_SEED, PROMPTS, commit
from blockcache import recipes
from blockcache.pipelines import models, samplers
from blockcache.pipelines.embedded.world import held_out_prompts
from blockcache.pipelines.options import quiet_hosts
from blockcache.plan import Recipe
from blockcache.plan.trace import Trace
from blockcache.tuning.compare import Arm, Trial, compare
from blockcache.tuning.comparison import Comparison, Entry
from blockcache.tuning.runs import latent_error, with_segments

RESULTS = Path(__file__).resolve().parent / "results" / "recipes.json"
PLOT = Path(__file__).resolve().parent.parent / "docs" / "images" / "recipes.png"
CALIBRATION, CALIBRATION_SEED, SPAN = 8, 11, 8

# Recipe to its main knob and the values it is swept over.
SWEEPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "ada_cache": (
        "table",
        tuple(((x, 6), (2 * x, 4), (4 * x, 3), (6 * x, 2)) for x in (0.01, 0.03)),
    ),
    "bac": ("updates", (30, 20, 12)),
    "block_caching": ("threshold", (0.02, 0.05, 0.1, 0.2)),
    "block_dance": ("group", (2, 3, 4)),
    "bud_cache": ("budget", (0.48, 0.32, 0.22)),
    "db_cache": ("threshold", (0.02, 0.05, 0.1, 0.2)),
    "deep_cache": ("interval", (2, 3)),
    "delta_dit": ("interval", (2, 3, 4)),
    "di_cache": ("threshold", (0.05, 0.1, 0.2, 0.4)),
    "dp_cache": ("budget", (0.6, 0.48, 0.32, 0.22, 0.16)),
    "easy_cache": ("threshold", (0.02, 0.05, 0.1, 0.2)),
    "every": ("n", (2, 3, 4, 6)),
    "faster_cache": ("interval", (2, 3, 4)),
    "first_block": ("threshold", (0.02, 0.05, 0.1, 0.2)),
    "fo_ca": ("interval", (2, 3, 4, 6)),
    "fora": ("interval", (2, 3, 4)),
    "geometric": ("budget", (0.6, 0.48, 0.32, 0.22, 0.16)),
    "golden_path": ("computed", (21, 13, 9)),
    "hi_cache": ("interval", (2, 3, 4, 6)),
    "l2p": ("budget", (0.6, 0.48, 0.32, 0.22)),
    "le_mi_ca": ("budget", (0.6, 0.48, 0.32, 0.22)),
    "mag_cache": ("threshold", (0.02, 0.06, 0.12, 0.3)),
    "pab": ("attn", (2, 3, 4)),
    "sea_cache": ("threshold", (0.05, 0.1, 0.2, 0.4)),
    "smooth_cache": ("threshold", (0.02, 0.05, 0.1, 0.2)),
    "sortblock": ("interval", (3, 5, 7)),
    "spe_ca": ("threshold", (0.05, 0.1, 0.3)),
    "spectrum": ("growth", (0.25, 0.75, 1.5, 3.0)),
    "taylor_seer": ("interval", (2, 3, 4, 6)),
    "tea_cache": ("threshold", (0.05, 0.1, 0.2, 0.4)),
}
# A shorter search than its default, which would take an hour here.
_FIXED: dict[str, dict[str, Any]] = {"bud_cache": {"proposals": 80, "rounds": 1}}
_FEWER = (40, 30, 20, 14, 10, 7)


def settings_of(
    name: str, trace: Trace, score: Callable[[Recipe], float]
) -> list[tuple[str, Recipe]]:
    """The recipe at every value of its knob."""
    knob, values = SWEEPS[name]
    given = {"trace": trace, "score": score}
    needed = {what: given[what] for what in recipes.needs(name)}
    make = partial(recipes.function(name), **needed, **_FIXED.get(name, {}))
    return [(f"{knob}={_shown(value)}", make(**{knob: value})) for value in values]


def _shown(value: Any) -> str:
    return f"{value[0][0]:g}.." if isinstance(value, tuple) else f"{value:g}"


def race(pipe: Any, call: dict[str, Any], arms: Sequence[Arm]) -> Comparison:
    """The arms, the uncached pipeline among them, in turns."""
    prompts = held_out_prompts(PROMPTS, PROMPT_SEED)
    seeds = range(FIRST_SEED, FIRST_SEED + PROMPTS)

    def offered(trial: Trial) -> Sequence[Arm]:
        return arms

    # The arm that `compare` insists on is the pipeline's own preset, for orientation.
    return compare(pipe, "balanced", prompts, seeds, 1, rivals=offered, **call)


def points(found: Comparison, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Speed and quality of each entry."""
    made = []
    for entry in entries:
        psnr, ssim = entry.spread("psnr_db"), entry.spread("ssim")
        if psnr is None or ssim is None:
            raise RuntimeError(f"{entry.name} has no quality")
        made.append(
            {
                "setting": entry.name,
                "speedup": found.speedup(entry),
                "psnr_db": {"median": psnr["median"], "worst": psnr["worst"]},
                "ssim": {"median": ssim["median"], "worst": ssim["worst"]},
            }
        )
    return made


def measure(
    name: str,
    pipe: Any,
    call: dict[str, Any],
    trace: Trace,
    score: Callable[[Recipe], float],
) -> dict[str, Any]:
    """One recipe over its knob, or the reason why the model has no use for it."""
    arms = []
    try:
        for label, recipe in settings_of(name, trace, score):
            with blockcache.enabled(pipe, recipe):
                pass
            arms.append(Arm(label, within=partial(blockcache.enabled, pipe, recipe)))
    except blockcache.BlockCacheError as error:
        return {"refused": str(error)}
    found = race(pipe, call, arms)
    return {"points": points(found, found.rivals), "baseline_s": found.baseline.median_s}


def fewer_steps(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The rival of all: the same sampler, and a second-order solver, with fewer steps."""
    arms = [Arm(f"{steps} steps", steps=steps) for steps in _FEWER]
    arms += [
        Arm(f"UniPC, {steps} steps", steps=steps, within=partial(_with_unipc, pipe))
        for steps in _FEWER
    ]
    found = race(pipe, call, arms)
    made = points(found, found.rivals)
    return {
        "fewer steps": {"points": [p for p in made if "UniPC" not in p["setting"]]},
        "UniPC": {"points": [p for p in made if "UniPC" in p["setting"]]},
    }


def _with_unipc(pipe: Any) -> Any:
    return samplers.swapped(pipe, samplers.unipc(pipe.scheduler))


def traced(pipe: Any, prompts: Sequence[str], call: dict[str, Any], folder: Path | None) -> Trace:
    """The calibration of all recipes, kept in `folder` if there is one."""
    if folder is not None and (folder / "trace.json").is_file():
        return Trace.load(folder)
    trace = with_segments(pipe, blockcache.trace(pipe, prompts, **call), SPAN)
    if folder is not None:
        trace.save(folder)
    return trace


def is_on_front(point: dict[str, Any], others: Sequence[dict[str, Any]], figure: str) -> bool:
    """Whether nobody is both faster and better (by the "median" or "worst" prompt)."""
    return not any(
        other["speedup"] > point["speedup"] and other["psnr_db"][figure] > point["psnr_db"][figure]
        for other in others
    )


def table(found: dict[str, dict[str, Any]]) -> str:
    """A markdown table of all points; bold where no recipe beats the median, star: the worst."""
    every = [p for entry in found.values() for p in entry.get("points", ())]
    lines = ["| recipe | setting | speed-up | PSNR dB, median / worst | SSIM, median / worst |"]
    lines.append("| --- | --- | --: | --: | --: |")
    for name, entry in found.items():
        if "refused" in entry:
            lines.append(f"| {name} | - | - | {entry['refused']} | |")
        for p in entry.get("points", ()):
            psnr, ssim = p["psnr_db"], p["ssim"]
            median = f"{psnr['median']:.1f}"
            worst = f"{psnr['worst']:.1f}"
            median = f"**{median}**" if is_on_front(p, every, "median") else median
            worst = f"**{worst}**" if is_on_front(p, every, "worst") else worst
            lines.append(
                f"| {name} | {p['setting']} | {p['speedup']:.2f}x | {median} / {worst} "
                f"| {ssim['median']:.4f} / {ssim['worst']:.4f} |"
            )
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Any]], file: Path) -> None:
    """Speed against quality, median and worst prompt, one line per recipe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6.5), sharex=True)
    markers = "osD^v<>ph*X"
    for panel, which in zip(panels, ("median", "worst"), strict=True):
        measured = {name: entry["points"] for name, entry in found.items() if "points" in entry}
        for i, (name, line) in enumerate(sorted(measured.items())):
            line = sorted(line, key=lambda p: p["speedup"])
            panel.plot(
                [p["speedup"] for p in line],
                [p["psnr_db"][which] for p in line],
                marker=markers[i % len(markers)],
                color=pyplot.get_cmap("tab20")(i % 20),
                linestyle="--" if name in ("fewer steps", "UniPC") else "-",
                markersize=4,
                linewidth=1,
                label=name,
            )
        panel.set_xscale("log")
        panel.set_xlabel("speed-up, wall time of the whole pipeline")
        panel.set_ylabel(f"PSNR against the uncached picture, {which} prompt, dB")
        panel.set_xticks([1, 1.5, 2, 3, 4, 6], ["1", "1.5", "2", "3", "4", "6"])
        panel.grid(alpha=0.3)
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


@click.command()
@click.option("--only", multiple=True, help="A recipe's name; may be repeated.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--trace", "folder", type=click.Path(path_type=Path), help="Keep the trace here.")
def main(only: tuple[str, ...], file: Path, folder: Path | None) -> None:
    """Measure, and write JSON, table and plot."""
    torch.set_num_threads(1)
    quiet_hosts()
    missing = sorted(set(recipes.names()) - set(SWEEPS))
    if missing:
        raise click.ClickException(f"no sweep for {', '.join(missing)}")
    chosen = models.find("tiny-image")
    pipe = models.load(chosen, torch.device("cpu"))
    prompts = held_out_prompts(CALIBRATION, CALIBRATION_SEED)
    trace = traced(pipe, prompts, chosen.call, folder)
    score = latent_error(pipe, prompts[:2], **chosen.call)
    known = json.loads(file.read_text())["recipes"] if file.is_file() else {}
    for name in only or (*SWEEPS, "fewer steps"):
        fresh = (
            fewer_steps(pipe, chosen.call)
            if name == "fewer steps"
            else {name: measure(name, pipe, chosen.call, trace, score)}
        )
        known |= fresh
        click.echo(table(fresh))
        text = f"{table(known)}\n\n*tiny-image, 50 steps, {PROMPTS} held-out prompts, one thread*"
        data = {"commit": commit(), "recipes": known, "markdown": text}
        file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw(known, PLOT)


if __name__ == "__main__":
    main()
