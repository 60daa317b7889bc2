"""One bar on rank 0 where there is a terminal, one line per item where there is none."""

from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from blockcache.pipelines.generate import claims
from blockcache.pipelines.generate.run import Run
from blockcache.pipelines.generate.saving import Result

if TYPE_CHECKING:
    from rich.progress import TaskID


class Progress:
    """Follows a run: items of all processes, seconds per item and reuse share of this one."""

    def __init__(self, run: Run) -> None:
        """Decide how to show it."""
        from rich import progress
        from rich.console import Console

        self._run, self._seconds, self._reuse, self._items = run, 0.0, 0.0, 0
        console = Console(stderr=True)
        self._is_speaker = run.worker.rank == 0
        self._has_bar = self._is_speaker and console.is_terminal
        columns = (
            progress.TextColumn("rendering"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(),
        )
        self._bar: Any = progress.Progress(
            *columns,
            console=console,
            disable=not self._has_bar,
            # Drawing takes time from the rendering; items may take minutes, and the time left is
            # reckoned from those of the last hour.
            refresh_per_second=2,
            speed_estimate_period=3600,
        )
        self._task: TaskID = self._bar.add_task("rendering", total=None, figures="")

    def __enter__(self) -> "Progress":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def show(self, result: Result) -> None:
        """Take in one result of this process."""
        counts = self._run.counts
        settled = counts[claims.DONE] + counts[claims.FAILED]
        total = settled + counts[claims.TODO]
        self._items += 1
        self._seconds += result.seconds
        self._reuse += result.row["reuse"]
        figures = f"{self._seconds / self._items:.2f} s each, reuse {self._reuse / self._items:.0%}"
        self._bar.update(self._task, completed=settled, total=total, figures=figures)
        if result.error:
            click.echo(f"failed: {result.id!r:.60}: {result.error}", err=True)
        elif self._is_speaker and not self._has_bar:
            took = f"{result.seconds:.2f} s, reuse {result.row['reuse']:.0%}"
            click.echo(f"{settled}/{total}  {result.id!r:.60}  {took}", err=True)
