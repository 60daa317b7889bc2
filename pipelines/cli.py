"""The command `blockcache`. Exit codes: 0 done, 1 failed, 2 bad input (one line on stderr)."""

import contextlib
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from blockcache.errors import BlockCacheError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_MAX_PROMPT_BYTES = 8 * 2**20
# Commands with files of their own, loaded when they are asked for.
_ELSEWHERE = {
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


def _debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors."
    )(command)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="blockcache")
@_debug_option
def main() -> None:
    """Faster diffusers pipelines by not doing work again, at a quality that is measured."""


# ---- compare ------------------------------------------------------------------------------------


@main.command()
@click.option(
    "--model", default="tiny-image", show_default=True, help="Embedded name, folder or hub id."
)
@click.option("--preset", help="quality, balanced or fast; balanced if nothing is said.")
@click.option("--recipe", help="A recipe's name, see `blockcache recipes`.")
@click.option("--plan", type=click.Path(path_type=Path), help="A plan file.")
@click.option("--prompt", "prompt", multiple=True, help="A prompt; may be repeated.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file, one prompt a line.")
@click.option("--steps", type=click.IntRange(1, 10_000), help="Sampler steps.")
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Of the first item."
)
@click.option("--height", type=click.IntRange(1), help="In pixels.")
@click.option("--width", type=click.IntRange(1), help="In pixels.")
@click.option("--device", help="For example cuda; the first GPU if there is one, else cpu.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of weights.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; 1 for embedded models.")
@click.option(
    "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Of each picture."
)
@click.option("--rivals", is_flag=True, help="Race against fewer steps and another sampler, too.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs/compare"), show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="Print compare.json instead of the table.")
@_debug_option
def compare(
    model: str,
    preset: str | None,
    recipe: str | None,
    plan: Path | None,
    prompt: tuple[str, ...],
    prompts: Path | None,
    steps: int | None,
    seed: int,
    height: int | None,
    width: int | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    repeats: int,
    rivals: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Render with and without the cache and say what it cost and what it saved."""
    from blockcache.pipelines import compare as writer
    from blockcache.pipelines import models, samplers
    from blockcache.tuning.compare import compare as race

    what = _what(preset, recipe, plan)
    found = models.find(model)
    items = [*prompt, *(read_prompts(prompts) if prompts else ())] or list(found.prompts)
    if not items:
        raise BlockCacheError("no prompts: give --prompt TEXT or --prompts FILE")
    writer.check_folder(out)
    is_embedded = model in models.EMBEDDED
    set_threads(threads, is_embedded)
    place = models.device_for(device)
    quiet_hosts()
    pipe = models.load(found, place, _dtype(dtype, place.type, is_embedded))
    asked = {"num_inference_steps": steps, "height": height, "width": width}
    call = found.call | {key: value for key, value in asked.items() if value is not None}
    with _progress(is_shown=not as_json) as on_progress:
        outcome = race(
            pipe,
            what,
            items,
            range(seed, seed + len(items)),
            repeats,
            rivals=samplers.rivals if rivals else None,
            on_progress=on_progress,
            **call,
        )
    outcome = replace(outcome, model=found.name)
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


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, blank ones left out.

    Raises:
        BlockCacheError: no readable file of UTF-8 text, too large, or nothing in it.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise BlockCacheError(f"cannot read prompts from {path}: found {found}, expected a file")
    try:
        if path.stat().st_size > _MAX_PROMPT_BYTES:
            raise BlockCacheError(f"{path} is larger than {_MAX_PROMPT_BYTES >> 20} MiB; not read")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BlockCacheError(f"cannot read prompts from {path}: {error}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise BlockCacheError(f"no prompts in {path}")
    return lines


def set_threads(wanted: int | None, is_embedded: bool) -> None:
    """Embedded models are so small that a second thread costs more than it does."""
    import torch

    if wanted is not None:
        torch.set_num_threads(wanted)
    elif is_embedded and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _dtype(wanted: str | None, device: str, is_embedded: bool) -> Any:
    import torch

    if wanted is None:
        wanted = "bfloat16" if device == "cuda" and not is_embedded else "float32"
    return getattr(torch, wanted)


def quiet_hosts() -> None:
    """Keep the hosts' remarks and progress bars out of what we print."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextlib.contextmanager
def _progress(is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while pictures are rendered; nothing where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("rendering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console.is_terminal and is_shown
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("rendering", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ---- what there is ------------------------------------------------------------------------------


@main.command()
@_debug_option
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
@_debug_option
def recipes() -> None:
    """List presets and recipes with their settings."""
    from blockcache.methods.presets import BUDGETS
    from blockcache.pipelines import recipe_table

    presets = [(word, f"{share:.0%} of the steps computed") for word, share in BUDGETS.items()]
    _show("Presets", ("name", "what"), presets)
    rows = recipe_table.rows()
    _show("Recipes", recipe_table.COLUMNS, [row.cells() for row in rows])
    _show("Settings", ("recipe", "settings"), [(row.name, row.settings) for row in rows])


@main.command()
@_debug_option
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
@_debug_option
def show(file: Path) -> None:
    """Draw what a plan computes and what it reuses."""
    from rich.console import Console

    from blockcache.pipelines.drawing import plan_lines
    from blockcache.plan import Plan

    console = Console(highlight=False)
    for line in plan_lines(Plan.load(file), console.width):
        console.print(line, soft_wrap=True)


def _show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, header_style="dim")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print()


if __name__ == "__main__":
    main()
