"""The command `blockcache trace`."""

from pathlib import Path
from typing import Any

import click

from blockcache.pipelines.options import bar, common_options, loaded


@click.command("trace")
@common_options
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs/trace"), show_default=True
)
def command(out: Path, **common: Any) -> None:
    """Run prompts uncached and write down how every part of the model moves over the steps."""
    from blockcache.pipelines.compare import check_folder
    from blockcache.tuning.trace import trace

    check_folder(out)
    pipe, prompts, call = loaded(common)
    seeds = range(common["seed"], common["seed"] + len(prompts))
    with bar("tracing") as update:
        found = trace(pipe, prompts, seeds, out, on_progress=update, **call)
    for name, ms in found.milliseconds.items():
        click.echo(f"{name:32} {ms:8.2f} ms")
    click.echo(f"wrote the trace of {len(found.prompts)} prompts to {out}", err=True)
