"""From measured points to fronts and to the figures that decide the race.

A point is a speed-up and a quality in dB. Pure functions, so that they can be checked by hand.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.ground import FEWER, OURS, PEERS, SIDES
from blockcache.tuning.quality import CAP_DB

TARGETS_DB = (45.0, 40.0, 35.0, 30.0)
SPEEDS = (2.0, 3.0, 4.0)
QUALITIES = ("median", "worst")
# What was set as an aim before anything was measured.
_WALL_RATIO, _OVER_PEERS_DB = 0.6, 5.0
_OVER_FEWER_DB = {"median": 3.0, "worst": 5.0}
_LEAST_DB, _LEAST_SPEEDUP = 30.0, 5.0


@dataclass(frozen=True)
class Point:
    """One contender: speed-up, dB of the median or the worst prompt, and what it is."""

    speedup: float
    db: float
    name: str = ""


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other is at least as fast and at least as good as, slowest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speedup, -p.db)):
        if not kept or point.db > kept[-1].db:
            kept.append(point)
    return kept[::-1]


def speed_at(points: Iterable[Point], db: float) -> tuple[float, str]:
    """The speed-up at a quality, and who has it.

    Between two neighbours of the front the logarithm of the speed-up runs straight in dB. Below the
    lowest quality of the front it is that of the fastest point; above the highest it is 1: there is
    the uncached run.
    """
    line = front(points)
    enough = [point for point in line if point.db >= db]
    if not enough:
        return 1.0, "uncached"
    slower, faster = enough[-1], line[len(enough) : len(enough) + 1]
    if not faster:
        return slower.speedup, slower.name
    share = (slower.db - db) / (slower.db - faster[0].db)
    speed = _between(math.log(slower.speedup), math.log(faster[0].speedup), share)
    return math.exp(speed), (slower if share < 0.5 else faster[0]).name


def db_at(points: Iterable[Point], speedup: float) -> tuple[float, str] | None:
    """The quality at a speed-up, and who has it; None where nobody is that fast.

    Between two neighbours of the front dB run straight in the logarithm of the speed-up; below the
    lowest speed-up of the front it is the quality of the slowest point.
    """
    line = front(points)
    enough = [point for point in line if point.speedup >= speedup]
    if not enough:
        return None
    faster, slower = enough[0], line[: len(line) - len(enough)][-1:]
    if not slower:
        return faster.db, faster.name
    span = math.log(faster.speedup / slower[0].speedup)
    share = math.log(speedup / slower[0].speedup) / span
    return _between(slower[0].db, faster.db, share), (slower[0] if share < 0.5 else faster).name


def dominated(ours: Iterable[Point], theirs: Iterable[Point]) -> list[tuple[Point, Point]]:
    """Points of our front with a point of theirs that is faster and better."""
    others = front(theirs)
    return [
        (our, their)
        for our in front(ours)
        for their in others
        if their.speedup > our.speedup and their.db > our.db
    ]


def unmatched(ours: Sequence[Point], theirs: Iterable[Point]) -> list[Point]:
    """Points of their front that none of ours is at least as fast and as good as: what we lose."""
    return [
        their
        for their in front(theirs)
        if not any(our.speedup >= their.speedup and our.db >= their.db for our in ours)
    ]


def points_of(rows: Iterable[dict[str, Any]], side: str, quality: str) -> list[Point]:
    """The measured rows of a side; without those whose pictures are the uncached ones."""
    return [
        Point(row["speedup"], row["psnr_db"][quality], f"{row['family']}: {row['setting']}")
        for row in rows
        if row["side"] == side and "psnr_db" in row and row["psnr_db"]["worst"] < CAP_DB
    ]


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is said about the race, as plain data."""
    points = {(s, q): points_of(rows, s, q) for s in SIDES for q in QUALITIES}
    found: dict[str, Any] = {
        "at_db": [_at_db(points, db) for db in TARGETS_DB],
        "at_speed": [_at_speed(points, speed) for speed in SPEEDS],
        "tuned": [
            _tuned_row(row, points) for row in rows if row["family"] == "tuned" and "psnr_db" in row
        ],
        "fastest_at_30_db": {
            side: max((p.speedup for p in points[side, "median"] if p.db >= _LEAST_DB), default=1.0)
            for side in SIDES
        },
        "dominated_by_peers": {
            q: [_pair(*pair) for pair in dominated(points[OURS, q], points[PEERS, q])]
            for q in QUALITIES
        },
        "not_matched": {
            side: {
                q: [vars(p) for p in unmatched(points[OURS, q], points[side, q])] for q in QUALITIES
            }
            for side in (PEERS, FEWER)
        },
    }
    return {**found, "aims": aims(found)}


Points = dict[tuple[str, str], list[Point]]


def _at_db(points: Points, db: float) -> dict[str, Any]:
    found: dict[str, Any] = {"db": db}
    for side in SIDES:
        speed, name = speed_at(points[side, "median"], db)
        found[side] = {"speedup": speed, "name": name}
    return found


def _at_speed(points: Points, speed: float) -> dict[str, Any]:
    found: dict[str, Any] = {"speedup": speed}
    for side in SIDES:
        found[side] = {}
        for quality in QUALITIES:
            at = db_at(points[side, quality], speed)
            found[side][quality] = None if at is None else {"db": at[0], "name": at[1]}
    return found


def _tuned_row(row: dict[str, Any], points: Points) -> dict[str, Any]:
    db = row["psnr_db"]["median"]
    peer, name = speed_at(points[PEERS, "median"], db)
    return {
        "plan": row["setting"],
        "speedup": row["speedup"],
        "psnr_db": {q: row["psnr_db"][q] for q in QUALITIES},
        "peer_speedup": peer,
        "peer": name,
        "wall_ratio": peer / row["speedup"],
    }


def aims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, what was, and whether that is enough."""
    made: list[dict[str, Any]] = []

    def aim(text: str, value: float | None, limit: float, is_enough: bool) -> None:
        made.append({"aim": text, "value": value, "limit": limit, "met": is_enough})

    for row in found["at_db"]:
        ratio = row[PEERS]["speedup"] / row[OURS]["speedup"]
        text = f"wall time over the best peer's, {row['db']:g} dB median, at most"
        aim(text, ratio, _WALL_RATIO, ratio <= _WALL_RATIO)
    for row in found["at_speed"]:
        ahead = _ahead(row, PEERS, "worst")
        text = f"dB over the best peer's worst prompt at {row['speedup']:g}x, at least"
        aim(text, ahead, _OVER_PEERS_DB, _is_ahead(row, ahead, _OVER_PEERS_DB))
        for quality, limit in _OVER_FEWER_DB.items():
            ahead = _ahead(row, FEWER, quality)
            text = f"dB over the best of fewer steps at {row['speedup']:g}x, {quality}, at least"
            aim(text, ahead, limit, _is_ahead(row, ahead, limit))
    pairs = sum(len(pairs) for pairs in found["dominated_by_peers"].values())
    aim("our front points that a peer is faster and better than, at most", pairs, 0, pairs == 0)
    fastest = found["fastest_at_30_db"][OURS]
    text = f"speed-up at {_LEAST_DB:g} dB median, at least"
    aim(text, fastest, _LEAST_SPEEDUP, fastest >= _LEAST_SPEEDUP)
    return made


def _ahead(row: dict[str, Any], side: str, quality: str) -> float | None:
    """How far we are above a side at one speed; None where one of us is not that fast."""
    ours, theirs = row[OURS][quality], row[side][quality]
    return ours["db"] - theirs["db"] if ours and theirs else None


def _is_ahead(row: dict[str, Any], ahead: float | None, limit: float) -> bool:
    """Nobody on the other side being that fast is enough; none of ours is not."""
    return ahead >= limit if ahead is not None else row[OURS]["median"] is not None


def _pair(our: Point, their: Point) -> dict[str, Any]:
    return {"ours": vars(our), "theirs": vars(their)}


def _between(a: float, b: float, share: float) -> float:
    return a + (b - a) * share


def picked(points: Sequence[Point], worst: Sequence[Point], keep: int) -> list[int]:
    """Which settings of a method go on from the sweep to the race: indices into `points`.

    points, worst: median and worst prompt of the same settings, every name once. First those that
    the figures are made of (the fastest at every target, the best at every speed, the next one
    behind every target), then the rest of both fronts, until there are `keep`.
    """
    by_median, by_worst = front(points), front(worst)
    wanted = [p for db in TARGETS_DB for p in [p for p in by_median if p.db >= db][-1:]]
    wanted += [p for speed in SPEEDS for p in [p for p in by_worst if p.speedup >= speed][:1]]
    wanted += [p for db in TARGETS_DB for p in [p for p in by_median if p.db < db][:1]]
    wanted += [*_spread(by_median), *_spread(by_worst)]
    names = [point.name for point in points]
    return sorted(list(dict.fromkeys(names.index(point.name) for point in wanted))[:keep])


def _spread(line: Sequence[Point]) -> list[Point]:
    """The ends first, then the middles of what is left."""
    if len(line) <= 2:
        return list(line)
    order, parts = [line[0], line[-1]], [(0, len(line) - 1)]
    while parts:
        low, high = parts.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(line[middle])
            parts += [(low, middle), (middle, high)]
    return order
