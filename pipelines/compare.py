"""Writes a comparison to a folder: pictures, sheets and `compare.json`."""

import io
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from blockcache.errors import BlockCacheError
from blockcache.pipelines import films, sheets
from blockcache.tuning.comparison import Comparison, Picture

FIGURES = "compare.json"
_FRAME_MS = 62


def check_folder(folder: Path) -> None:
    """Refuse a place that cannot be written to, before anything is computed.

    Raises:
        BlockCacheError: it is a file, or lies where nothing may be written.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise BlockCacheError(f"cannot write to {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BlockCacheError(f"cannot write to {folder}: no permission in {existing}")


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write everything; each file appears complete or not at all. Returns the files.

    `000-uncached.png`, `000-<name>.png`, ...: the pictures (videos as animated PNG, which is
    lossless). `side-by-side.png`: the median and the worst prompt with times and decibels on them.
    `all.png`: every prompt. `strip.png`: which block was computed in which step. `density.png`:
    how much of its attention, where some was sparse. For videos also `side-by-side.mp4` (a GIF
    where there is no ffmpeg) and `frames.png`, frames of the worst prompt. `compare.json`: the
    figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = _pictures(comparison)
    files["side-by-side.png"] = _png(sheets.side_by_side(comparison))
    files["all.png"] = _png(sheets.all_pairs(comparison))
    files["strip.png"] = _png(sheets.strip(comparison))
    density = sheets.density(comparison)
    if density is not None:
        files["density.png"] = _png(density)
    written = []
    if films.is_video(comparison):
        files["frames.png"] = _png(films.strip(comparison))
        frames, film = films.side_by_side(comparison), folder / "side-by-side.mp4"
        if films.mp4(frames, film, {"model": comparison.model, "steps": comparison.steps}):
            written.append(film)
        else:
            files["side-by-side.gif"] = films.gif(frames)
    text = json.dumps(comparison.as_dict(), indent=1, allow_nan=False) + "\n"
    # The figures last: who finds them finds the pictures too.
    files[FIGURES] = text.encode()
    return written + [_write(folder / name, data) for name, data in files.items()]


def _pictures(c: Comparison) -> dict[str, bytes]:
    files = {}
    for entry, label in ((c.baseline, "uncached"), (c.accelerated, _slug(c.accelerated.name))):
        for i, picture in enumerate(entry.pictures):
            about = {
                "prompt": c.prompts[i],
                "seed": c.seeds[i],
                "model": c.model,
                "steps": c.steps,
                "blockcache": c.accelerated.name if entry is c.accelerated else "off",
            }
            files[f"{i:03d}-{label}.png"] = _picture_png(picture, about)
    return files


def _slug(name: str) -> str:
    """A name that may stand in a file name."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._") else "-" for c in name)
    return kept.strip("-.") or "accelerated"


def _picture_png(picture: Picture, about: dict[str, Any]) -> bytes:
    info = PngInfo()
    for key, value in about.items():
        info.add_itxt(key, str(value))
    first, *rest = sheets.frames_of(picture)
    buffer = io.BytesIO()
    if rest:
        first.save(
            buffer,
            "PNG",
            pnginfo=info,
            save_all=True,
            append_images=rest,
            duration=_FRAME_MS,
            loop=0,
        )
    else:
        first.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
