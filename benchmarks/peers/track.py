"""The track: everybody renders the same items in turns with the uncached run.

Every measurement is written down as it comes, so that a run that was cut goes on from there.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.peers.figures import QUALITIES, Point, picked
from benchmarks.peers.ground import Contender, Ground, Impossible, Lane
from blockcache.tuning import environment, quality
from blockcache.tuning.comparison import Picture
from blockcache.tuning.stage import Item

BETWEEN = 8
"""Contenders between two uncached runs; each is timed against the mean of the two around it."""

LIBRARIES = ("torch", "diffusers", "cache-dit")


class OutOfTime(Exception):
    """The minutes that were allowed are over."""


class Log:
    """Measurements in a file, one JSON object a line."""

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        """Read what is there.

        Raises:
            Impossible: it was measured under other circumstances.
        """
        self._file, self._entries = file, []
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            # The last line may have been cut.
            for line in file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    self._entries.append(json.loads(line))
        if not self._entries:
            self.add(about)
        elif self._entries[0] != about:
            raise Impossible(
                f"{file} was measured with {self._entries[0]}, this is {about}; delete it or give "
                "another --work folder"
            )

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry down."""
        self._entries.append(entry)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def of(self, phase: str) -> Iterator[dict[str, Any]]:
        """The entries of a phase."""
        return (entry for entry in self._entries if entry.get("phase") == phase)

    def objections(self) -> dict[str, str]:
        """Why contenders cannot run, by key."""
        return {e["key"]: e["objection"] for e in self._entries if "objection" in e}


def about(ground: Ground) -> dict[str, Any]:
    """What measurements have to have in common."""
    call = {"call": ground.changed} if ground.changed else {}
    return {
        "model": ground.model.name,
        "steps": ground.steps,
        **call,
        "versions": environment.versions(LIBRARIES),
        "cpu": environment.machine()["cpu"],
    }


class Track:
    """Runs contenders over items.

    deadline: by time.monotonic(). say: told about progress.
    """

    def __init__(
        self, ground: Ground, log: Log, deadline: float, say: Callable[[str], None]
    ) -> None:
        self.ground, self.log, self.deadline, self.say = ground, log, deadline, say
        self._uncached: dict[Item, Picture] = {}
        self.floor_db = quality.CAP_DB
        self._full = 0

    def sweep(self, contenders: Iterable[Contender], keep: int) -> list[Contender]:
        """The best `keep` settings of every method, by the sweep's own prompts."""
        methods: dict[str, list[Contender]] = {}
        for contender in contenders:
            methods.setdefault(contender.family, []).append(contender)
        chosen: list[Contender] = []
        for family, settings in methods.items():
            self.say(f"sweep: {family}, {len(settings)} settings")
            self._run("sweep", settings, self.ground.sweep, 1)
            rows = summaries(settings, self.log, "sweep")
            swept = [row for row in rows if has_effect(row)]
            median, worst = (
                [Point(row["speedup"], row["psnr_db"][which], row["key"]) for row in swept]
                for which in QUALITIES
            )
            kept = {swept[i]["key"] for i in picked(median, worst, keep)}
            chosen += [setting for setting in settings if setting.key in kept]
        return chosen

    def race(self, contenders: Sequence[Contender], rounds: int) -> None:
        """Everybody on the race's items."""
        self.say(f"race: {len(contenders)} contenders, {len(self.ground.race)} prompts")
        self._run("race", contenders, self.ground.race, rounds)

    def _run(
        self, phase: str, contenders: Sequence[Contender], items: Sequence[Item], rounds: int
    ) -> None:
        done = {(e["key"], e["seed"], e["round"]) for e in self.log.of(phase) if "seconds" in e}
        lanes: dict[str, Lane] = {}
        for turn in range(rounds):
            for i, item in enumerate(items):
                missing = [c for c in contenders if (c.key, item[1], turn) not in done]
                # Another neighbour, and another place in the order, for each item.
                shift = (i * 5) % max(1, len(missing))
                self._item(phase, missing[shift:] + missing[:shift], item, turn, lanes)
                self.say(f"{phase}: round {turn + 1}, prompt {i + 1} of {len(items)}")

    def _item(
        self,
        phase: str,
        contenders: Sequence[Contender],
        item: Item,
        turn: int,
        lanes: dict[str, Lane],
    ) -> None:
        """All contenders on one item, the uncached run before, between and after them."""
        waiting: list[dict[str, Any]] = []
        before_s = self._uncached_s(item) if contenders else 0.0
        for start in range(0, len(contenders), BETWEEN):
            for contender in contenders[start : start + BETWEEN]:
                if time.monotonic() > self.deadline:
                    raise OutOfTime
                found = self._measured(phase, contender, item, lanes)
                if found is not None:
                    waiting.append({"phase": phase, "round": turn, **found})
            after_s = self._uncached_s(item)
            for entry in waiting:
                self.log.add({**entry, "uncached_s": (before_s + after_s) / 2})
            waiting, before_s = [], after_s

    def _measured(
        self, phase: str, contender: Contender, item: Item, lanes: dict[str, Lane]
    ) -> dict[str, Any] | None:
        """Seconds and quality of one contender; None where it cannot run."""
        if contender.key in self.log.objections():
            return None
        try:
            if contender.key not in lanes:
                lanes[contender.key] = self._ready(phase, contender)
            found = lanes[contender.key].render(item)
        # Whatever a peer raises is an answer, too: the table gives it as the reason.
        except Exception as error:
            reason = str(error) if isinstance(error, Impossible) else _said(error)
            self.log.add({"key": contender.key, "objection": reason})
            lanes.pop(contender.key, None)
            return None
        if found.picture is None:
            raise RuntimeError("a render without a picture")
        db = psnr_db(found.picture, self._uncached[item])
        return {"key": contender.key, "seed": item[1], "seconds": found.seconds, "psnr_db": db}

    def _ready(self, phase: str, contender: Contender) -> Lane:
        """Its lane; in the race also warm, and with what it computes counted."""
        lane = contender.enter(self.ground)
        if phase == "race":
            item = self.ground.sweep[0]
            self._full = self._full or self.ground.plain.multiplications(item)
            share = lane.multiplications(item) / self._full
            self.log.add({"phase": phase, "key": contender.key, "computed": share})
        return lane

    def _uncached_s(self, item: Item) -> float:
        found = self.ground.plain.render(item)
        if found.picture is None:
            raise RuntimeError("a render without a picture")
        first = self._uncached.setdefault(item, found.picture)
        if found.picture is not first:
            self.floor_db = min(self.floor_db, quality.psnr(found.picture, first))
        return found.seconds


def psnr_db(picture: Picture, uncached: Picture) -> float:
    """Of a picture `[H, W, C]`; of a video `[F, H, W, C]` the mean over its frames."""
    if picture.ndim == 3:
        return quality.psnr(picture, uncached)
    return statistics.fmean(map(quality.psnr, picture, uncached))


def summaries(contenders: Iterable[Contender], log: Log, phase: str) -> list[dict[str, Any]]:
    """One row per contender, over the prompts that all of them have rendered.

    speedup is the median of the ratios to the uncached runs beside it.
    """
    contenders = list(contenders)
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in log.of(phase):
        entries.setdefault(entry["key"], []).append(entry)
    objections, rows = log.objections(), []
    runs = {
        c.key: [entry for entry in entries.get(c.key, ()) if "seconds" in entry]
        for c in contenders
        if c.key not in objections
    }
    seeds = [{run["seed"] for run in found} for found in runs.values() if found]
    common = set.intersection(*seeds) if seeds else set()
    for contender in contenders:
        row: dict[str, Any] = {
            "side": contender.side,
            "family": contender.family,
            "setting": contender.setting,
            "key": contender.key,
        }
        found = [run for run in runs.get(contender.key, ()) if run["seed"] in common]
        if contender.key in objections:
            rows.append({**row, "objection": objections[contender.key]})
        elif found:
            counted = [e["computed"] for e in entries[contender.key] if "computed" in e]
            computed = {"computed": counted[-1]} if counted else {}
            rows.append({**row, **_summary(found), **computed})
    return rows


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_seed = {run["seed"]: run["psnr_db"] for run in runs}
    return {
        "prompts": len(by_seed),
        "speedup": statistics.median(run["uncached_s"] / run["seconds"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "psnr_db": {"median": statistics.median(by_seed.values()), "worst": min(by_seed.values())},
    }


def has_effect(row: dict[str, Any]) -> bool:
    """Whether a measured row's pictures differ at all from the uncached ones."""
    return "psnr_db" in row and bool(row["psnr_db"]["worst"] < quality.CAP_DB)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
