"""The presets on the embedded model, beside fewer steps: `python -m benchmarks.presets`.

16 prompts of the evaluation split, 50 steps, one CPU thread, every picture rendered in turns with
its rivals: as many plain steps as fit in the same wall time, plain steps on the plan's own noise
levels, and UniPC of order 2 on both. Prints a markdown table and writes
`benchmarks/results/presets.json`.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import click
import torch

import blockcache
from blockcache.methods.presets import BUDGETS
from blockcache.pipelines import models, samplers
from blockcache.pipelines.embedded.world import held_out_prompts
from blockcache.pipelines.options import quiet_hosts
from blockcache.tuning.compare import compare
from blockcache.tuning.comparison import Comparison, Entry

RESULTS = Path(__file__).resolve().parent / "results" / "presets.json"
# Other prompts than those `blockcache compare` shows.
PROMPTS, PROMPT_SEED, FIRST_SEED = 16, 7, 1000
COLUMNS = ("", "steps", "seconds", "speed-up", "PSNR dB", "foreground dB", "SSIM", "computed")


def measure(word: str, pipe: Any, call: dict[str, Any], repeats: int) -> Comparison:
    """One preset against the uncached run and its rivals."""
    prompts = held_out_prompts(PROMPTS, PROMPT_SEED)
    seeds = range(FIRST_SEED, FIRST_SEED + PROMPTS)
    return compare(pipe, word, prompts, seeds, repeats, rivals=samplers.rivals, **call)


def one_summary(pipe: Any, call: dict[str, Any]) -> str:
    """What the summary says after one picture with the default preset."""
    with blockcache.enabled(pipe):
        pipe(held_out_prompts(1, PROMPT_SEED)[0], generator=torch.manual_seed(FIRST_SEED), **call)
        return str(blockcache.summary(pipe))


def table(found: dict[str, Comparison]) -> list[str]:
    """A markdown table: each preset, its rivals below it."""
    lines = [" | ".join(COLUMNS), " | ".join(["---"] + ["--:"] * (len(COLUMNS) - 1))]
    baseline = next(iter(found.values()))
    start = ("uncached", str(baseline.steps), f"{baseline.baseline.median_s:.2f}", "1.00x")
    lines.append(" | ".join([*start, "", "", "", "100%"]))
    for c in found.values():
        lines.append(
            _row(c, c.accelerated, f"**{c.accelerated.name}**", f"{c.computed_fraction:.0%}")
        )
        lines += [_row(c, rival, rival.name, "") for rival in c.rivals]
    return [f"| {line} |" for line in lines]


def _row(c: Comparison, entry: Entry, name: str, computed: str) -> str:
    figures = (("psnr_db", 1), ("foreground_db", 1), ("ssim", 3))
    quality = [_pair(entry.spread(figure), digits) for figure, digits in figures]
    seconds, speedup = f"{entry.median_s:.2f}", f"{c.speedup(entry):.2f}x"
    return " | ".join([name, str(entry.steps), seconds, speedup, *quality, computed])


def _pair(figures: dict[str, float] | None, digits: int) -> str:
    if figures is None:
        return "-"
    return f"{figures['median']:.{digits}f} / {figures['worst']:.{digits}f}"


def header(c: Comparison) -> str:
    """What the table was made with."""
    versions = ", ".join(f"{name} {c.versions[name]}" for name in ("torch", "diffusers", "python"))
    machine = f"{c.machine['cpu']}, {c.machine['threads']} thread, {c.machine['dtype']}"
    what = f"{c.model}, {c.steps} steps, {len(c.prompts)} held-out prompts, median / worst prompt"
    return f"{what}; {machine}; {versions}; commit {commit()}"


def commit() -> str:
    """The checkout's commit, marked if files differ from it; "unknown" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    place = Path(__file__).resolve().parent
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--model", default="tiny-image", show_default=True, help="Embedded name or folder.")
def main(file: Path, repeats: int, model: str) -> None:
    """Measure every preset and print the table."""
    torch.set_num_threads(1)
    quiet_hosts()
    chosen = models.find(model)
    pipe = models.load(chosen, torch.device("cpu"))
    found = {word: measure(word, pipe, chosen.call, repeats) for word in BUDGETS}
    first = next(iter(found.values()))
    title = header(first).replace(first.model, chosen.name, 1)
    click.echo("\n".join([title, "", *table(found)]))
    presets = {word: {**c.as_dict(), "model": chosen.name} for word, c in found.items()}
    text = "\n".join([*table(found), "", f"*{title}*"])
    data = {"commit": commit(), "versions": first.versions, "presets": presets, "markdown": text}
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = {"markdown": f"```\n{one_summary(pipe, chosen.call)}\n```"}
    file.with_name("summary.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
