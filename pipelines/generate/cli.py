"""The command `blockcache generate`. Exit codes: 0 all done, 1 some failed, 2 bad input."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

from blockcache.errors import BlockCacheError
from blockcache.pipelines.drawing import COMPUTED, REUSED
from blockcache.pipelines.generate import claims
from blockcache.pipelines.generate.job import Chosen
from blockcache.pipelines.generate.progress import Progress
from blockcache.pipelines.generate.run import REPLACED, Run
from blockcache.pipelines.generate.settings import Config
from blockcache.pipelines.options import debug_option
from blockcache.plan import Plan, even_steps

_PLANS = ("plan", "preset", "recipe")
_ECHO_S = 1.0
_WHOLE = ("stack", "model")
"""Sites of which a step is computed or reused as a whole."""


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Let run.yaml give the defaults; what stands on the command line wins."""
    if path is None:
        return
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BlockCacheError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise BlockCacheError(f"{path} must hold names and values, found {type(found).__name__}")
    known = [p.name for p in context.command.params if p.name not in ("config", "dry_run")]
    unknown = sorted(str(name) for name in found if name not in known)
    if unknown:
        names = ", ".join(str(name) for name in known)
        raise BlockCacheError(f"{path}: unknown name {unknown[0]!r} (known: {names})")
    for name, value in found.items():
        if isinstance(value, (list, dict)) and name != "arguments":
            raise BlockCacheError(f"{path}: {name} takes one value, found {value!r:.60}")
    if isinstance(found.get("arguments"), dict):
        found["arguments"] = [f"{k}={yaml.safe_dump(v)}" for k, v in found["arguments"].items()]
    context.default_map = found


def _read_arguments(_: click.Context, __: click.Parameter, given: Any) -> dict[str, Any]:
    """The texts `NAME=VALUE`, values in YAML."""
    import yaml

    found = {}
    for pair in given:
        name, is_there, value = str(pair).partition("=")
        if not is_there or not name.isidentifier():
            raise BlockCacheError(f"--argument takes NAME=VALUE, found {pair!r:.60}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise BlockCacheError(
                f"--argument {name} takes a YAML value, found {value!r:.60}"
            ) from None
    return found


@click.command()
@click.option("--prompts", help="A .txt, .jsonl or .csv file.")
@click.option(
    "--model", default="tiny-image", show_default=True, help="Embedded name, folder or hub id."
)
@click.option("--out", default="outputs/generate", show_default=True, help="Folder of the results.")
@click.option("--plan", help="A plan file.")
@click.option("--preset", help="quality, balanced or fast, or none; balanced if nothing is said.")
@click.option("--recipe", help="A recipe's name, see `blockcache recipes`.")
@click.option("--baseline", is_flag=True, help="Render every item uncached, too, and measure.")
@click.option(
    "--overwrite/--resume",
    default=False,
    help="Render everything again, or (the default) only what is not done with these settings.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of row 0; others count on.")
@click.option("--steps", type=int, help="Sampler steps.")
@click.option("--height", type=int, help="In pixels.")
@click.option("--width", type=int, help="In pixels.")
@click.option("--guidance", type=float, help="Guidance scale.")
@click.option("--frames", type=int, help="Of a video.")
@click.option("--fps", type=int, default=16, show_default=True, help="Of a video.")
@click.option("--negative-prompt", help="For rows without one of their own.")
@click.option(
    "--argument",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_read_arguments,
    help="Another argument of the pipeline call; may be repeated.",
)
@click.option("--batch-size", type=int, default=1, show_default=True, help="Items in one call.")
@click.option("--device", help="For example cuda:1; each process's own GPU if there is one.")
@click.option("--dtype", help="float32, bfloat16 or float16.")
@click.option("--threads", type=int, help="CPU threads; 1 for embedded models.")
@click.option("--skip-bad", is_flag=True, help="Leave out rows that cannot be read.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first item that fails.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="A run.yaml; options given here win.",
)
@debug_option
@click.pass_context
def command(context: click.Context, /, dry_run: bool, **given: Any) -> int:
    """Render a file of prompts; resumable, by one process or many.

    The same command again goes on where it was stopped; on several machines, or under
    `accelerate launch -m blockcache.pipelines.generate`, the processes share the work.
    """
    from blockcache.pipelines import cli, models, options

    if given["prompts"] is None:
        raise BlockCacheError("no prompts: give --prompts FILE")
    plans = {name: given.pop(name) for name in _PLANS}
    given["plan"] = _one_plan(context, plans)
    settings = {name: value for name, value in given.items() if value is not None}
    config = Config.of(**settings)
    options.quiet_hosts()
    options.set_threads(config.threads, config.model in models.EMBEDDED)
    with _patience() as should_stop:
        run = Run(config, should_stop)
        if dry_run:
            _say_what_would_be_done(run)
            return 0
        with Progress(run) as progress:
            for result in run.results():
                progress.show(result)
        _say_what_was_done(run)
        if should_stop():
            return cli.INTERRUPTED
    # The last one says it: launchers end the others when one process fails.
    return cli.FAILED if run.report is not None and run.counts[claims.FAILED] else 0


def _one_plan(context: click.Context, plans: dict[str, str | None]) -> str:
    """The plan's name; the command line wins over run.yaml, whichever of the three it uses."""
    given = {name: value for name, value in plans.items() if value is not None}
    typed = {
        name: value
        for name, value in given.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    given = typed or given
    if len(given) > 1:
        raise BlockCacheError("--preset, --recipe and --plan exclude each other; give one of them")
    return next(iter(given.values()), "balanced")


@contextmanager
def _patience() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C, and SIGTERM, let the current item finish; the second Ctrl-C stops at once.

    Launchers hand a Ctrl-C on to processes that the terminal has told already, so an echo within
    a second does not count.
    """
    asked: list[float] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and asked and now - asked[0] > _ECHO_S:
            raise KeyboardInterrupt
        if not asked:
            # Not click.echo: the signal may have come in the middle of one.
            os.write(2, b"\nfinishing the current item; Ctrl-C again stops at once\n")
            asked.append(now)

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_what_would_be_done(run: Run) -> None:
    standing = run.standing()
    status = standing.status
    done, todo = status.count(claims.DONE), status.count(claims.TODO)
    click.echo(f"{len(status)} rows in {run.job.prompts}: {todo} to do, {done} done already")
    if standing.replaced:
        click.echo(REPLACED.format(standing.replaced))
    for row in run.survey.bad[:10]:
        click.echo(f"left out: line {row.line}: {row.why}")
    call = ", ".join(f"{name} {value}" for name, value in run.job.call.items())
    click.echo(f"model: {run.job.model.name}" + (f" ({call})" if call else ""))
    click.echo(f"plan: {_described(run.job.plan, run.job.call.get('num_inference_steps'))}")


def _described(plan: Chosen, steps: int | None) -> str:
    """The plan in a line; where all of it is known beforehand, how many steps it computes."""
    if plan.what is None:
        return "none, nothing is cached"
    recipe = plan.what.recipe if isinstance(plan.what, Plan) else plan.what
    steps = steps or (plan.what.total if isinstance(plan.what, Plan) else None)
    if not recipe.is_static():
        return f"{plan.name}, decides while it runs"
    if steps is None or any(rule.site.scope not in _WHOLE for rule in recipe.rules):
        return plan.name
    (row,) = recipe.rules[0].schedule(even_steps(steps), 1) or ((),)
    drawn = "".join(COMPUTED if asked else REUSED for asked in row)
    return f"{plan.name} computes {drawn.count(COMPUTED)} of {steps} steps\n{drawn}"


def _say_what_was_done(run: Run) -> None:
    if run.report is not None:
        click.echo(str(run.report))
    elif run.worker.rank == 0:
        click.echo("others are still at work; the last one makes the manifest and the gallery")
