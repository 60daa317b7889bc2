"""The command `blockcache`. Exit codes: 0 done, 1 failed, 2 bad input (one line on stderr)."""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from blockcache.errors import BlockCacheError
from blockcache.pipelines.options import bar, common_options, debug_option, loaded

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_WIDE = 150
"""Columns from which on a terminal has room for whole tables."""
# Commands with files of their own, loaded when they are asked for.
_ELSEWHERE = {
    "demo": "blockcache.demo.app",
    "generate": "blockcache.pipelines.generate.cli",
    "report": "blockcache.pipelines.report_cli",
    "trace": "blockcache.pipelines.trace_cli",
    "tune": "blockcache.pipelines.tune_cli",
}


class OneLineErrors(click.Group):
    """A group whose errors are one line each; tracebacks only with --debug."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The names of all commands."""
        return sorted([*super().list_commands(context), *_ELSEWHERE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of that name."""
        if name not in _ELSEWHERE:
            return super().get_command(context, name)
        command: click.Command = importlib.import_module(_ELSEWHERE[name]).command
        return command

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run a command and leave with its exit code."""
        words = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(words, *rest, **{**extra, "standalone_mode": False})
        except (Exception, KeyboardInterrupt) as error:
            if "--debug" in words:
                traceback.print_exc()
            code, message = _verdict(error)
            if message:
                click.echo(f"blockcache: {message}", err=True)
        sys.exit(code if isinstance(code, int) else 0)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and the line to say."""
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return INTERRUPTED, "interrupted"
    if isinstance(error, BrokenPipeError):
        # The reader of our output has seen enough; nobody is left to be told.
        sys.stdout = open(os.devnull, "w")
        return FAILED, ""
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    line = " ".join(lines[:2]) if lines else type(error).__name__
    is_bad_input = isinstance(error, (click.ClickException, BlockCacheError))
    if not is_bad_input or _is_failure(error):
        return FAILED, f"failed: {type(error).__name__}: {line}"
    return BAD_INPUT, f"error: {line}"


def _is_failure(error: BaseException) -> bool:
    """Whether one of our own errors is no fault of the input."""
    from blockcache.tuning.quality import QualityError

    return isinstance(error, QualityError)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="blockcache")
@debug_option
def main() -> None:
    """Faster diffusers pipelines by not doing work again, at a quality that is measured."""


# ---- compare ------------------------------------------------------------------------------------


@main.command()
@common_options
@click.option("--preset", help="quality, balanced or fast; balanced if nothing is said.")
@click.option("--recipe", help="A recipe's name, see `blockcache recipes`.")
@click.option("--plan", type=click.Path(path_type=Path), help="A plan file.")
@click.option("--prompt", "prompt", multiple=True, help="A prompt; may be repeated.")
@click.option(
    "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Of each picture."
)
@click.option("--rivals", is_flag=True, help="Race against fewer steps and another sampler, too.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs/compare"), show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="Print compare.json instead of the table.")
def compare(
    preset: str | None,
    recipe: str | None,
    plan: Path | None,
    prompt: tuple[str, ...],
    repeats: int,
    rivals: bool,
    out: Path,
    as_json: bool,
    **common: Any,
) -> None:
    """Render with and without the cache and say what it cost and what it saved."""
    from blockcache.pipelines import compare as writer
    from blockcache.pipelines import models, samplers
    from blockcache.tuning.compare import compare as race

    what = _what(preset, recipe, plan)
    writer.check_folder(out)
    pipe, prompts, call = loaded(common, prompt)
    with bar("rendering", is_shown=not as_json) as on_progress:
        outcome = race(
            pipe,
            what,
            prompts,
            range(common["seed"], common["seed"] + len(prompts)),
            repeats,
            rivals=samplers.rivals if rivals else None,
            on_progress=on_progress,
            **call,
        )
    outcome = replace(outcome, model=models.find(common["model"]).name)
    files = writer.write(outcome, out)
    figures = json.dumps(outcome.as_dict(), indent=1, allow_nan=False)
    click.echo(figures if as_json else str(outcome))
    click.echo(f"wrote {len(files)} files to {out}", err=True)


def _what(preset: str | None, recipe: str | None, plan: Path | None) -> Any:
    """What to enable. Reads the plan, so that a bad one is refused before a model is loaded."""
    from blockcache import api, recipes
    from blockcache.methods.presets import BUDGETS

    given = [value for value in (preset, recipe, plan) if value is not None]
    if len(given) > 1:
        raise BlockCacheError("--preset, --recipe and --plan exclude each other; give one of them")
    if preset is not None and preset not in BUDGETS:
        raise BlockCacheError(f"unknown preset {preset!r} (known: {', '.join(BUDGETS)})")
    if recipe is not None and recipe not in recipes.names():
        raise BlockCacheError(f"unknown recipe {recipe!r} (known: {', '.join(recipes.names())})")
    return api.read(plan) if plan is not None else recipe or preset or "balanced"


# ---- what there is ------------------------------------------------------------------------------


@main.command()
@debug_option
def models() -> None:
    """List embedded models and the families the tests cover."""
    from blockcache.pipelines.models import EMBEDDED, FAMILIES

    embedded = [
        (name, entry.about, "ready" if entry.folder.is_dir() else "not in this installation")
        for name, entry in EMBEDDED.items()
    ]
    _show("Embedded", ("name", "what", "state"), embedded)
    rows = [(family.name, family.pipeline, family.makes) for family in FAMILIES]
    _show("Tested families", ("family", "pipeline", "makes"), rows)
    click.echo(
        "Any other diffusers pipeline: the blocks are looked for by structure and watched during "
        "the\nfirst step; where that gives no safe answer the model is refused, never guessed at.\n"
        "--model also takes a pipeline folder or a hub id (owner/name)."
    )


@main.command()
@debug_option
def recipes() -> None:
    """List presets and recipes with their settings."""
    from blockcache.methods.presets import BUDGETS
    from blockcache.pipelines import recipe_table

    presets = [(word, f"{share:.0%} of the steps computed") for word, share in BUDGETS.items()]
    _show("Presets", ("name", "what"), presets)
    rows = recipe_table.rows()
    _show("Recipes", recipe_table.COLUMNS, [row.cells() for row in rows], recipe_table.LESS_URGENT)
    _show("Settings", ("recipe", "settings"), [(row.name, row.settings) for row in rows])


@main.command()
@debug_option
def env() -> None:
    """Print versions and machine, for a problem report."""
    import torch

    from blockcache.tuning import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {
        **environment.versions(environment.LIBRARIES + environment.OPTIONAL),
        **environment.machine(device),
        "mps": str(torch.backends.mps.is_available()),
    }
    width = max(map(len, found))
    for name, value in found.items():
        click.echo(f"{name:{width}}  {value}")


# ---- plans --------------------------------------------------------------------------------------


@main.group()
def plans() -> None:
    """Look at plan files."""


@plans.command()
@click.argument("file", type=click.Path(path_type=Path))
@debug_option
def show(file: Path) -> None:
    """Draw what a plan computes and what it reuses."""
    from rich.console import Console

    from blockcache.pipelines.drawing import plan_lines
    from blockcache.plan import Plan

    console = Console(highlight=False)
    for line in plan_lines(Plan.load(file), console.width):
        console.print(line, soft_wrap=True)


def _show(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    less_urgent: Collection[str] = (),
) -> None:
    """Print a table; without the less urgent columns where the terminal is narrow."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    is_narrow = console.width < _WIDE
    shown = [i for i, c in enumerate(columns) if not (is_narrow and c in less_urgent)]
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i in shown:
        table.add_column(columns[i], header_style="dim", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    if len(shown) < len(columns):
        console.print(f"{', '.join(less_urgent)}: in a terminal of {_WIDE} columns", style="dim")
    console.print()


if __name__ == "__main__":
    main()
