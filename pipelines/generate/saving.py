"""From a rendered item to its file, its line in the manifest and the end of its claim."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockcache.pipelines.generate import claims, files, manifest
from blockcache.pipelines.generate.claims import Claims
from blockcache.pipelines.generate.job import ModelName
from blockcache.pipelines.generate.names import stem_for
from blockcache.pipelines.generate.render import Rendered
from blockcache.tuning import environment, quality
from blockcache.tuning.comparison import Picture

ITEMS, UNCACHED = "items", "uncached"


@dataclass(frozen=True)
class Result:
    """An item that this process has finished. file: None if it failed; error says why.

    row: its line in the manifest.
    """

    id: str
    status: str
    file: Path | None
    seconds: float
    error: str
    row: dict[str, Any]


class Saver:
    """Saves what one process renders. Used by one thread, while the next item is rendered."""

    def __init__(self, folder: Path, book: Claims, model: ModelName, fps: int, rank: int) -> None:
        """Open this process's part of the manifest."""
        self._folder, self._book, self._model, self._fps = folder, book, model, fps
        self._part = manifest.Part(folder, rank)
        self._where = {"rank": rank, "host": socket.gethostname()}
        self._versions = environment.versions(("blockcache", "torch", "diffusers"))

    def close(self) -> None:
        """Close the manifest."""
        self._part.close()

    def save(self, rendered: Sequence[Rendered]) -> list[Result]:
        """Save every item of a batch.

        Raises:
            StorageError: the folder can no longer be written to. The items stay claimed, and free
                for others when this process ends.
        """
        try:
            return [self._save(one) for one in rendered]
        except OSError as error:
            raise files.storage_error(error, self._folder) from error

    def _save(self, one: Rendered) -> Result:
        about = self._about(one)
        found: dict[str, Any] = {"file": None, "error": one.error}
        if not one.error:
            try:
                found |= self._written(one, about)
            # The disk is everybody's trouble; anything else is this item's own.
            except OSError:
                raise
            except Exception as error:
                found["error"] = f"cannot save: {type(error).__name__}: {error}"[:500]
        status = "failed" if found["error"] else "done"
        row = {**about, "status": status, **found, **_figures(one), **self._where}
        row["finished"] = time.time()
        self._part.append(row)
        self._book.settle(one.item.number, claims.FAILED if found["error"] else claims.DONE)
        file = self._folder / found["file"] if found["file"] else None
        return Result(one.item.id, status, file, one.seconds, found["error"], row)

    def _about(self, one: Rendered) -> dict[str, Any]:
        """What the item was made from; the same whenever and wherever it is made."""
        item = one.item
        return {
            "id": item.id,
            "row": item.number,
            "prompt": item.prompt,
            "seed": item.seed,
            "model": self._model.name,
            "model_hash": self._model.hash,
            "settings": dict(item.call),
            "plan": item.plan.name,
            "plan_hash": item.plan.hash,
            "settings_hash": item.hash,
            "versions": self._versions,
        }

    def _written(self, one: Rendered, about: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if one.baseline is not None and one.picture is not None:
            scores = quality.scores(one.picture, one.baseline)
            found = {
                "baseline_file": self._file(one.baseline, UNCACHED, {**about, "plan": "none"}),
                "baseline_s": round(one.baseline_s, 4),
                "psnr_db": round(scores.psnr_db, 3),
                "ssim": round(scores.ssim, 6),
            }
        if one.picture is not None:
            found["file"] = self._file(one.picture, ITEMS, about)
        return found

    def _file(self, picture: Picture, place: str, about: dict[str, Any]) -> str:
        """Write it; returns its path within the folder."""
        name = f"{place}/{stem_for(about['id'])}{files.ending(picture)}"
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        if place == ITEMS and path.exists():
            # Until the new file has a line of its own, the old one's must not speak for it.
            now = {"status": manifest.REPLACED, "file": None, "finished": time.time()}
            self._part.append({**about, **now})
        files.save(picture, path, about, self._fps)
        return name


def _figures(one: Rendered) -> dict[str, Any]:
    calls = one.counts.get("block_calls", 0)
    return {
        "counts": one.counts,
        "reuse": round(one.counts["block_calls_skipped"] / calls, 4) if calls else 0.0,
        "seconds": round(one.seconds, 4),
        "peak_gib": round(one.peak_gib, 3),
        "batch": one.batch,
    }
