"""What the commands that run a model on prompts share: options, loading, a bar."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from blockcache.errors import BlockCacheError

_MAX_PROMPT_BYTES = 8 * 2**20

debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors."
)
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
    debug_option,
)


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of everything that runs a model on prompts."""
    for option in reversed(_COMMON):
        command = option(command)
    return command


def loaded(
    common: dict[str, Any], own_prompts: Sequence[str] = ()
) -> tuple[Any, list[str], dict[str, Any]]:
    """Pipeline, prompts and call arguments from the common options.

    own_prompts: Of the command line itself; those of the file follow. Without either the model's
    examples are taken.

    Raises:
        BlockCacheError: no prompts, or no such model.
    """
    import torch

    from blockcache.pipelines import models

    found = models.find(common["model"])
    given = read_prompts(common["prompts"]) if common["prompts"] else []
    prompts = [*own_prompts, *given] or list(found.prompts)
    if not prompts:
        raise BlockCacheError("no prompts: give --prompts FILE, one a line")
    is_embedded = common["model"] in models.EMBEDDED
    set_threads(common["threads"], is_embedded)
    place = models.device_for(common["device"])
    quiet_hosts()
    dtype = dtype_name(common["dtype"], place.type, is_embedded)
    pipe = models.load(found, place, getattr(torch, dtype))
    asked = {"num_inference_steps": common["steps"]}
    asked |= {name: common[name] for name in ("height", "width")}
    return pipe, prompts, found.call | {k: v for k, v in asked.items() if v is not None}


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


def dtype_name(wanted: str | None, device: str, is_embedded: bool) -> str:
    """The dtype asked for; bfloat16 on a GPU and float32 elsewhere if none is."""
    return wanted or ("bfloat16" if device == "cuda" and not is_embedded else "float32")


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
def bar(what: str, is_shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; nothing where stderr is not a terminal."""
    with line(is_shown) as (shown, task):
        yield lambda done, total: shown.update(task, completed=done, total=total, doing=what)


@contextlib.contextmanager
def line(is_shown: bool = True) -> Iterator[tuple[Any, Any]]:
    """A bar whose words are its task's field `doing`, with that task."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.percentage:3.0f}%"),
        BarColumn(),
        TextColumn("{task.fields[doing]}"),
    )
    is_off = not (console.is_terminal and is_shown)
    with Progress(*columns, console=console, transient=True, disable=is_off) as shown:
        yield shown, shown.add_task("", total=None, doing="loading")
