"""The race as tables for README and docs, and as a plot."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.figures import QUALITIES, Point, front, points_of
from benchmarks.peers.ground import FEWER, OURS, PEERS, SIDES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PLOT = ROOT / "docs" / "images" / "peers.png"

_COLORS = {PEERS: "#c8553d", FEWER: "#6b7280", OURS: "#1f6fb4"}
_MARKERS = {PEERS: "s", FEWER: "^", OURS: "o"}


def compact(races: dict[str, dict[str, Any]]) -> str:
    """What the README shows: every race at equal quality and at equal wall time."""
    return "\n\n".join(_compact(race) for race in races.values())


def every_row() -> str:
    """All rows of all races, from the results file: for docs/race.md."""
    if not RESULTS.is_file():
        return "*Not measured yet: `python -m benchmarks.peers`.*"
    races = json.loads(RESULTS.read_text(encoding="utf-8"))["races"]
    return "\n\n".join(_chapter(race) for race in races.values())


def title(race: dict[str, Any]) -> str:
    """What a race was run with, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in race["versions"].items())
    machine = race["machine"]
    # Races from before sizes could be chosen have no such entry.
    size = "".join(f"{name} {value}, " for name, value in race.get("call", {}).items())
    return (
        f"{race['model']}, {race['steps']} steps, {size}{race['prompts']} prompts that nothing was "
        f"tuned on; {machine['cpu']}, {machine['threads']} thread; {versions}; "
        f"commit {race['commit']}"
    )


def _compact(race: dict[str, Any]) -> str:
    found = race["figures"]
    lines = [f"| {race['model']}, {race['steps']} steps | {' | '.join(reversed(SIDES))} |"]
    lines.append("| --- | --: | --: | --: |")
    for row in found["at_db"]:
        cells = {side: (row[side]["speedup"], _speed(row[side])) for side in SIDES}
        lines.append(_line(f"speed at {row['db']:g} dB median", cells))
    for row in found["at_speed"]:
        for quality in QUALITIES:
            at = {side: row[side][quality] for side in SIDES}
            cells = {side: (a["db"] if a else -math.inf, _quality(a)) for side, a in at.items()}
            lines.append(_line(f"{quality} prompt at {row['speedup']:g}x", cells))
    met = sum(aim["met"] for aim in found["aims"])
    return "\n".join([*lines, "", f"*{met} of {len(found['aims'])} aims met. {title(race)}*"])


def _line(what: str, cells: dict[str, tuple[float, str]]) -> str:
    best = max(value for value, _ in cells.values())
    shown = [
        f"**{text}**" if value == best and math.isfinite(best) else text
        for value, text in (cells[side] for side in reversed(SIDES))
    ]
    return f"| {what} | {' | '.join(shown)} |"


def _speed(at: dict[str, Any]) -> str:
    return f"{at['speedup']:.2f}x ({_family(at)})"


def _quality(at: dict[str, Any] | None) -> str:
    return f"{at['db']:.1f} dB ({_family(at)})" if at else "not that fast"


def _family(at: dict[str, Any]) -> str:
    return str(at["name"]).partition(": ")[0]


def _aims(aims: Sequence[dict[str, Any]]) -> str:
    lines = ["| aim | limit | found | |", "| --- | --: | --: | --- |"]
    for aim in aims:
        value = "-" if aim["value"] is None else f"{aim['value']:.2f}"
        verdict = "met" if aim["met"] else "**missed**"
        lines.append(f"| {aim['aim']} | {aim['limit']:g} | {value} | {verdict} |")
    return "\n".join(lines)


def _chapter(race: dict[str, Any]) -> str:
    parts = [f"### {race['model']}, {race['steps']} steps", _compact(race)]
    parts += ["**What was to be reached**", _aims(race["figures"]["aims"])]
    parts += ["**The plans that were tuned**", _tuned(race["figures"]["tuned"])]
    parts += ["**What we lose**", "\n".join(_losses(race["figures"]))]
    parts += ["**Every row**", _rows(race["rows"])]
    parts += ["**What could not run, or had no effect**", "\n".join(_silent(race)) or "Nothing."]
    tried = ", ".join(f"{family} {count}" for family, count in race["swept"].items())
    parts += [f"Settings tried in the sweep: {tried}."]
    return "\n\n".join(parts)


def _tuned(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| plan | speed-up | dB, median / worst | best peer at this median | wall time ratio |",
        "| --- | --: | --: | --- | --: |",
    ]
    for row in rows:
        peer = f"{row['peer_speedup']:.2f}x ({row['peer']})"
        lines.append(
            f"| {row['plan']} | {row['speedup']:.2f}x | {_pair(row['psnr_db'])} | {peer} "
            f"| {row['wall_ratio']:.2f} |"
        )
    return "\n".join(lines)


def _losses(found: dict[str, Any]) -> Iterator[str]:
    for quality, pairs in found["dominated_by_peers"].items():
        for pair in pairs:
            ours, theirs = _point(pair["ours"]), _point(pair["theirs"])
            yield f"- {quality}: {theirs} is faster and better than our {ours}"
    for side, by_quality in found["not_matched"].items():
        for quality, points in by_quality.items():
            named = "; ".join(map(_point, points)) or "none"
            yield f"- {quality}: of {side}, none of ours is both as fast and as good as: {named}"


def _point(point: dict[str, Any]) -> str:
    return f"{point['name']} ({point['speedup']:.2f}x, {point['db']:.1f} dB)"


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    """Measured rows; in bold what is on the front of all sides, by median or worst prompt."""
    best = {
        quality: {
            point.name
            for point in front(p for side in SIDES for p in points_of(rows, side, quality))
        }
        for quality in QUALITIES
    }
    lines = [
        "| side | method | setting | speed-up | median dB | worst dB | computed |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    order = {side: i for i, side in enumerate(reversed(SIDES))}
    measured = [row for row in rows if "psnr_db" in row]
    for row in sorted(measured, key=lambda r: (order[r["side"]], r["family"], r["speedup"])):
        name = f"{row['family']}: {row['setting']}"
        shown = [
            f"**{row['psnr_db'][q]:.1f}**" if name in best[q] else f"{row['psnr_db'][q]:.1f}"
            for q in QUALITIES
        ]
        lines.append(
            f"| {row['side']} | {row['family']} | {row['setting']} | {row['speedup']:.2f}x "
            f"| {shown[0]} | {shown[1]} | {row['computed']:.0%} |"
        )
    return "\n".join(lines)


def _silent(race: dict[str, Any]) -> Iterator[str]:
    """Settings that cannot run, together where the reason is the same; and those without effect."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in race["rows"]:
        if "objection" in row:
            reasons.setdefault((row["family"], row["objection"]), []).append(row["setting"])
    for row in race["without_effect"]:
        why = "the pictures are the uncached ones, bit for bit"
        reasons.setdefault((row["family"], why), []).append(row["setting"])
    for (family, why), settings in reasons.items():
        yield f"- {family} ({'; '.join(settings)}): {why}"


def _pair(psnr: dict[str, float]) -> str:
    return f"{psnr['median']:.1f} / {psnr['worst']:.1f}"


def draw(races: Iterable[dict[str, Any]], file: Path = PLOT) -> None:
    """Speed against quality, median and worst prompt: all points, and the front of each side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    races = list(races)
    size = (11, 4.6 * len(races))
    figure, panels = pyplot.subplots(len(races), 2, figsize=size, sharey="row", squeeze=False)
    for line, race in zip(panels, races, strict=True):
        for panel, quality in zip(line, QUALITIES, strict=True):
            for side in SIDES:
                _draw_side(panel, side, points_of(race["rows"], side, quality))
            panel.set_title(f"{race['model']}, {race['steps']} steps, {quality} prompt")
            panel.set_xscale("log")
            ticks = [1, 1.5, 2, 3, 4, 6, 8]
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.set_xticks([], minor=True)
            panel.set_xlabel("speed-up, wall time of the whole pipeline call")
            panel.grid(alpha=0.25)
        line[0].set_ylabel("PSNR against the uncached picture, dB")
    panels[0][0].legend(loc="upper right", frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_side(panel: Any, side: str, points: Sequence[Point]) -> None:
    look = {"color": _COLORS[side], "marker": _MARKERS[side]}
    speeds, dbs = [p.speedup for p in points], [p.db for p in points]
    panel.scatter(speeds, dbs, s=12, alpha=0.35, linewidths=0, **look)
    best = front(points)
    panel.plot([p.speedup for p in best], [p.db for p in best], ms=4.5, lw=1.6, label=side, **look)
