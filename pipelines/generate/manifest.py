"""What became of every item, as JSON lines: one file per process, merged by the last to leave.

A line is appended and forced to the disk when its item is finished. A process that is killed can
leave half a line behind; whoever reads leaves it out. Of several lines for one id the last counts.
"""

import hashlib
import json
import os
import socket
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

NAME, PARTS = "manifest.jsonl", "parts"
REPLACED = "replaced"
"""Status of an id whose old file is about to make way for a new one."""

_NEEDED: dict[str, Any] = {
    **dict.fromkeys(("id", "status", "settings_hash"), str),
    **{"row": int, "file": str | None, "finished": (int, float)},
}
_MOST_OPEN = 256


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
            if isinstance(row, dict) and row.keys() >= _NEEDED.keys():
                if all(isinstance(row[name], kind) for name, kind in _NEEDED.items()):
                    yield start, row
            start += len(line)


def files(folder: Path) -> list[Path]:
    """The merged file and every part that there is."""
    merged = [folder / NAME] if (folder / NAME).is_file() else []
    return merged + sorted((folder / PARTS).glob("*.jsonl"))


def latest(folder: Path) -> Iterator[bytes]:
    """The last line of each id, in the order of the prompts.

    Lines are never all in memory: only where each begins.
    """
    sources = files(folder)
    keys, numbers, places = array("Q"), array("q"), array("Q")
    origins, times = array("Q"), array("d")
    for origin, path in enumerate(sources):
        for place, row in _lines(path):
            keys.append(key_of(row["id"], ""))
            numbers.append(row["row"])
            places.append(place)
            origins.append(origin)
            times.append(row["finished"])
    if not keys:
        return
    # By id; what is merged already comes first, the rest by time.
    is_new = np.asarray([path.name != NAME for path in sources])[np.asarray(origins)]
    order = np.lexsort((times, is_new, keys))
    sorted_keys = np.asarray(keys)[order]
    kept = order[np.append(sorted_keys[1:] != sorted_keys[:-1], True)]
    with _Opened() as opened:
        for i in kept[np.argsort(np.asarray(numbers)[kept], kind="stable")]:
            source = opened.file(sources[origins[i]])
            source.seek(places[i])
            yield source.readline().rstrip(b"\n") + b"\n"


class _Opened(ExitStack):
    """Files that are read by turns; not all of hundreds at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, BinaryIO] = {}

    def file(self, path: Path) -> BinaryIO:
        if path not in self._files:
            if len(self._files) == _MOST_OPEN:
                self._files.clear()
                self.close()
            self._files[path] = self.enter_context(path.open("rb"))
        return self._files[path]


def done(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of all items that are done and whose file is still there."""
    for line in latest(folder):
        row = json.loads(line)
        if row["status"] == "done" and (folder / str(row["file"])).is_file():
            yield row


def merge(folder: Path) -> Path:
    """Make one file of all, a line per id, in the order of the prompts, and remove the parts."""
    sources = files(folder)
    merged, partial = folder / NAME, folder / f".{NAME}.partial"
    with partial.open("wb") as out:
        out.writelines(latest(folder))
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, merged)
    for path in sources:
        if path != merged:
            path.unlink()
    with suppress(OSError):
        (folder / PARTS).rmdir()
    return merged
