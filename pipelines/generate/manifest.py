"""What became of every item, as JSON lines: one file per process, merged by the last to leave.

A line is appended and forced to the disk when its item is finished. A process that is killed can
leave half a line behind; whoever reads leaves it out.
"""

import contextlib
import hashlib
import json
import os
import socket
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAME, PARTS = "manifest.jsonl", "parts"
_NEEDED = {"id", "row", "status", "file", "settings_hash", "finished"}


def key_of(name: str, settings_hash: str) -> int:
    """64 bits that stand for an id with its settings."""
    digest = hashlib.sha256(f"{settings_hash} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


class Part:
    """The lines of one process."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Open this process's file in `folder`, after whatever stands in it."""
        place = folder / PARTS
        place.mkdir(exist_ok=True)
        path = place / f"rank-{rank:04d}-{socket.gethostname()}-{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._is_torn = not _ends_with_newline(self._file)

    def append(self, row: dict[str, Any]) -> None:
        """Write one line, and see it safe on the disk."""
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        rest = b"\n" + line if self._is_torn else line
        self._is_torn = True
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._is_torn = False
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _ends_with_newline(file: int) -> bool:
    size = os.fstat(file).st_size
    return not size or os.pread(file, 1, size - 1) == b"\n"


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of one file."""
    for _, row in _lines(path):
        yield row


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each whole line begins, and what it says."""
    with path.open("rb") as file:
        start = 0
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and row.keys() >= _NEEDED:
                yield start, row
            start += len(line)


def files(folder: Path) -> list[Path]:
    """The merged file and every part that there is."""
    merged = [folder / NAME] if (folder / NAME).is_file() else []
    return merged + sorted((folder / PARTS).glob("*.jsonl"))


def done_keys(folder: Path) -> NDArray[np.uint64]:
    """The keys of all items that are done and whose file is still there."""
    keys = array("Q")
    for path in files(folder):
        for row in rows(path):
            if row["status"] == "done" and (folder / str(row["file"])).is_file():
                keys.append(key_of(str(row["id"]), str(row["settings_hash"])))
    return np.frombuffer(keys, np.uint64) if keys else np.empty(0, np.uint64)


def merge(folder: Path) -> Path:
    """Make one file of all, a line per id, in the order of the prompts, and remove the parts.

    Of several lines for one id the last one finished counts. Lines are never all in memory: only
    where each begins.
    """
    sources = files(folder)
    keys, numbers, places = array("Q"), array("Q"), array("Q")
    origins, times = array("Q"), array("d")
    for origin, path in enumerate(sources):
        for place, row in _lines(path):
            keys.append(key_of(str(row["id"]), ""))
            numbers.append(int(row["row"]))
            places.append(place)
            origins.append(origin)
            times.append(float(row["finished"]))
    # By id and time; the last of each id is kept, and those in the order of their rows.
    order = np.lexsort((times, keys))
    sorted_keys = np.asarray(keys)[order]
    kept = order[np.append(sorted_keys[1:] != sorted_keys[:-1], True)] if len(order) else order
    kept = kept[np.argsort(np.asarray(numbers)[kept], kind="stable")]
    merged, partial = folder / NAME, folder / f".{NAME}.partial"
    opened = [path.open("rb") for path in sources]
    try:
        with partial.open("wb") as out:
            for i in kept:
                source = opened[origins[i]]
                source.seek(places[i])
                out.write(source.readline().rstrip(b"\n") + b"\n")
            out.flush()
            os.fsync(out.fileno())
    finally:
        for source in opened:
            source.close()
    os.replace(partial, merged)
    for path in sources:
        if path != merged:
            path.unlink()
    with contextlib.suppress(OSError):
        (folder / PARTS).rmdir()
    return merged
