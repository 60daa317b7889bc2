"""The command `blockcache tune`."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from blockcache.errors import BlockCacheError
from blockcache.pipelines.options import common_options, line, loaded


@click.command("tune")
@common_options
@click.option("--psnr", type=float, help="Goal in dB, for example 35.")
@click.option("--ssim", type=float, help="Goal as structural similarity, for example 0.95.")
@click.option("--lpips", type=float, help="Goal as LPIPS; its weights must be on disk.")
@click.option("--speedup", type=float, help="Goal as a speed: the best plan at, for example, 3.")
@click.option("--share", type=float, default=0.5, show_default=True, help="Of the pictures.")
@click.option("--confidence", type=float, default=0.9, show_default=True, help="One-sided.")
@click.option("--quick", is_flag=True, help="A third of the search; no rivals.")
@click.option("--sub-layers", is_flag=True, help="Try single attentions and MLPs; needs memory.")
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
    sub_layers: bool,
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
    if out.is_dir():
        raise BlockCacheError(f"{out} is a folder; give the plan's file")
    if work is not None:
        check_folder(work)
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
            sub_layers=sub_layers,
            on_progress=on_progress,
            **call,
        )
    plan.save(out)
    click.echo(plan.note)
    if "speedup" in plan.reached:
        click.echo(f"{plan.reached['speedup']:.2f}x as fast as uncached")
    click.echo(f"wrote {out}; use it: blockcache.enable(pipe, {str(out)!r})", err=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    with line() as (bar, task):
        yield lambda p: bar.update(
            task, completed=p.runs, total=p.most_runs, doing=f"{p.doing}, {_time(p.seconds_left)}"
        )


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min left at most" if seconds > 90 else f"{seconds:.0f} s left"
