"""The command `blockcache tune`, and what it shares with `blockcache trace`."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from blockcache.errors import BlockCacheError

_COMMON = (
    click.option(
        "--model", default="tiny-image", show_default=True, help="Embedded name, folder or hub id."
    ),
    click.option(
        "--prompts", type=click.Path(path_type=Path), help="Text file, one prompt a line."
    ),
    click.option("--steps", type=click.IntRange(1, 10_000), help="Sampler steps."),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**62),
        default=0,
        show_default=True,
        help="Of the first prompt.",
    ),
    click.option("--height", type=click.IntRange(1), help="In pixels."),
    click.option("--width", type=click.IntRange(1), help="In pixels."),
    click.option("--device", help="For example cuda; the first GPU if there is one, else cpu."),
    click.option(
        "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of weights."
    ),
    click.option("--threads", type=click.IntRange(1), help="CPU threads; 1 for embedded models."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors."),
)


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of everything that runs a model on prompts."""
    for option in reversed(_COMMON):
        command = option(command)
    return command


@click.command("tune")
@common_options
@click.option("--psnr", type=float, help="Goal in dB, for example 35.")
@click.option("--ssim", type=float, help="Goal as structural similarity, for example 0.95.")
@click.option("--lpips", type=float, help="Goal as LPIPS; its weights must be on disk.")
@click.option("--speedup", type=float, help="Goal as a speed: the best plan at, for example, 3.")
@click.option("--share", type=float, default=0.5, show_default=True, help="Of the pictures.")
@click.option("--confidence", type=float, default=0.9, show_default=True, help="One-sided.")
@click.option("--quick", is_flag=True, help="A third of the search; no rivals.")
@click.option("--max-runs", type=click.FloatRange(1), help="Limit, in uncached runs.")
@click.option("--minutes", type=click.FloatRange(0.01), help="Limit on the time.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder to go on from later.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("plan.json"), show_default=True
)
def command(
    psnr: float | None,
    ssim: float | None,
    lpips: float | None,
    speedup: float | None,
    share: float,
    confidence: float,
    quick: bool,
    max_runs: float | None,
    minutes: float | None,
    work: Path | None,
    out: Path,
    **common: Any,
) -> None:
    """Ask for quality or speed, get the fastest plan that gives it, as a file."""
    from blockcache.pipelines.compare import check_folder
    from blockcache.pipelines.samplers import rivals
    from blockcache.tuning.tune import tune

    check_folder(out.parent)
    if psnr is ssim is lpips is speedup is None:
        raise BlockCacheError("give a goal: --psnr, --ssim, --lpips or --speedup")
    pipe, prompts, call = loaded(common)
    with _progress() as on_progress:
        plan = tune(
            pipe,
            prompts,
            seeds=range(common["seed"], common["seed"] + len(prompts)),
            psnr=psnr,
            ssim=ssim,
            lpips=lpips,
            speedup=speedup,
            share=share,
            confidence=confidence,
            effort="quick" if quick else "full",
            work=work,
            max_runs=max_runs,
            minutes=minutes,
            rivals=rivals,
            on_progress=on_progress,
            **call,
        )
    plan.save(out)
    click.echo(plan.note)
    if "speedup" in plan.reached:
        click.echo(f"{plan.reached['speedup']:.2f}x as fast as uncached")
    click.echo(f"wrote {out}; use it: blockcache.enable(pipe, {str(out)!r})", err=True)


def loaded(common: dict[str, Any]) -> tuple[Any, list[str], dict[str, Any]]:
    """Pipeline, prompts and call arguments from the common options."""
    from blockcache.pipelines import cli, models

    found = models.find(common["model"])
    prompts = cli.read_prompts(common["prompts"]) if common["prompts"] else list(found.prompts)
    if not prompts:
        raise BlockCacheError("no prompts: give --prompts FILE, one a line, 24 or more if possible")
    is_embedded = common["model"] in models.EMBEDDED
    cli.set_threads(common["threads"], is_embedded)
    place = models.device_for(common["device"])
    cli.quiet_hosts()
    pipe = models.load(found, place, cli._dtype(common["dtype"], place.type, is_embedded))
    asked = {"num_inference_steps": common["steps"]}
    asked |= {name: common[name] for name in ("height", "width")}
    return pipe, prompts, found.call | {k: v for k, v in asked.items() if v is not None}


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; nothing where stderr is not a terminal."""
    with _line() as (bar, task):
        yield lambda done, total: bar.update(task, completed=done, total=total, doing=what)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    with _line() as (bar, task):
        yield lambda p: bar.update(
            task, completed=p.runs, total=p.most_runs, doing=f"{p.doing}, {_time(p.seconds_left)}"
        )


@contextlib.contextmanager
def _line() -> Iterator[tuple[Any, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.percentage:3.0f}%"),
        BarColumn(),
        TextColumn("{task.fields[doing]}"),
    )
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        yield bar, bar.add_task("", total=None, doing="loading")


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min left at most" if seconds > 90 else f"{seconds:.0f} s left"
