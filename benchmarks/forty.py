"""The run that the README shows: `python -m benchmarks.forty`.

40 prompts on the embedded image model, killed by SIGKILL in the middle and begun again by the same
command. What the terminal showed goes into the README, the contact sheet to docs/images.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.readme import filled
from blockcache.pipelines.embedded.world import held_out_prompts
from blockcache.tuning import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "batch-run.json"
SHEET = ROOT / "docs" / "images" / "batch-sheet.png"
PAGE = ROOT / "README.md"
COMMAND = "blockcache generate --prompts prompts.txt --out runs/a"


def run(place: Path, kill_after: int = 0) -> str:
    """What the command shows in `place`; it is killed once that many items are finished."""
    words = COMMAND.split()[1:]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    shown = place / "shown"
    with shown.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "blockcache", *words],
            cwd=place,
            env=environ,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        while kill_after and process.poll() is None and len(finished(place)) < kill_after:
            time.sleep(0.01)
        if kill_after:
            process.kill()
        code = process.wait()
    text = shown.read_text(encoding="utf-8")
    if code != (-9 if kill_after else 0):
        raise click.ClickException(f"the command ended with {code}:\n{text}")
    return text


def finished(place: Path) -> list[dict[str, Any]]:
    """The manifest's lines so far."""
    files = [*place.glob("runs/a/parts/*.jsonl"), *place.glob("runs/a/manifest.jsonl")]
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def shortened(text: str, first: int) -> list[str]:
    """The first lines and the last one of what was counted, and everything else."""
    lines = text.splitlines()
    counted = [line for line in lines if "/" in line.split(" ")[0]]
    left_out = counted[first:-1]
    kept = ["..." if line in left_out[:1] else line for line in lines if line not in left_out[1:]]
    return kept


def check(place: Path, items: int, before: int) -> dict[str, Any]:
    """Every item is there once, and only what was in flight was rendered twice."""
    rows = finished(place)
    files = {path.name for path in place.glob("runs/a/items/*.png")}
    done = [row["row"] for row in rows if row["status"] == "done"]
    if done != list(range(items)) or len(files) != items:
        raise click.ClickException(f"{len(rows)} lines and {len(files)} files of {items} items")
    return {"items": items, "finished_before_the_kill": before}


def markdown(first: str, second: str) -> str:
    """The terminal's text."""
    lines = [f"$ {COMMAND}", *shortened(first, 1), "Killed"]
    lines += [f"$ {COMMAND}", *shortened(second, 2)]
    return "\n".join(["```", *lines, "```"])


@click.command()
@click.option("--items", default=40, show_default=True)
@click.option("--kill-after", default=16, show_default=True, help="Items.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), default=SHEET)
def main(items: int, kill_after: int, file: Path, sheet: Path) -> None:
    """Run, kill, run again; write what was shown and the contact sheet."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        prompts = "\n".join(held_out_prompts(items, seed=11))
        (place / "prompts.txt").write_text(prompts + "\n", encoding="utf-8")
        first = run(place, kill_after)
        before = len(finished(place))
        second = run(place)
        found: Mapping[str, Any] = {
            "versions": environment.versions(),
            "machine": environment.machine("cpu"),
            **check(place, items, before),
            "markdown": markdown(first, second),
        }
        shutil.copyfile(place / "runs/a/contact-sheet.png", sheet)
    click.echo(found["markdown"])
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if file == RESULTS:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), RESULTS.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
