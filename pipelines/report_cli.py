"""The command `blockcache report`."""

from pathlib import Path
from typing import Any

import click

from blockcache.pipelines.options import bar, common_options, loaded


@click.command("report")
@common_options
@click.option(
    "--plan", "plan_file", required=True, type=click.Path(path_type=Path), help="A plan file."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="The folder of the tuning that found it; every candidate is then drawn.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs/report"), show_default=True
)
def command(plan_file: Path, work: Path | None, out: Path, **common: Any) -> None:
    """Run prompts with and without a plan and write one page on what it does."""
    from blockcache.pipelines.compare import check_folder
    from blockcache.plan import Plan
    from blockcache.tuning.report import report

    plan = Plan.load(plan_file)
    check_folder(out)
    pipe, prompts, call = loaded(common)
    seeds = range(common["seed"], common["seed"] + len(prompts))
    with bar("rendering") as update:
        page = report(pipe, plan, prompts, seeds, out, work=work, on_progress=update, **call)
    click.echo(f"wrote {page}")
