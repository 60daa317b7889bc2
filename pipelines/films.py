"""Videos about videos: uncached, accelerated and their difference, in motion and as a strip."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blockcache.pipelines import sheets
from blockcache.tuning.comparison import Comparison
from blockcache.tuning.quality import CAP_DB

FPS = 16
_GAP = 8
_STRIP_FRAMES = 8
_STRIP_PX = 144


def is_video(c: Comparison) -> bool:
    """Whether it compares videos of more than one frame."""
    picture = c.baseline.pictures[0]
    return picture.ndim == 4 and len(picture) > 1


def side_by_side(c: Comparison) -> list[Image.Image]:
    """One image per frame: uncached, accelerated, difference; the median prompt above the worst."""
    shown = dict.fromkeys((c.accelerated.typical, c.accelerated.worst))
    rows = [_row(c, i) for i in shown]
    return [_below(frames) for frames in zip(*rows, strict=True)]


def strip(c: Comparison) -> Image.Image:
    """Some frames of the worst prompt: uncached, accelerated, difference, decibels below."""
    i = c.accelerated.worst
    before, after = c.baseline.pictures[i], c.accelerated.pictures[i]
    chosen = sorted({round(x) for x in np.linspace(0, len(before) - 1, _STRIP_FRAMES)})
    gain = sheets.gain(before, after)
    tiles = [
        [
            sheets.scaled(sheets.as_8bit(frame), _STRIP_PX)
            for frame in (before[f], after[f], np.abs(after[f] - before[f]) * gain)
        ]
        for f in chosen
    ]
    tile_w, tile_h = tiles[0][0].size
    left, top = 150, 78
    sheet = sheets.Sheet(left + len(chosen) * (tile_w + _GAP) + 28, top + 3 * (tile_h + _GAP) + 40)
    sheet.text(28, 20, sheets.headline(c), 24)
    sheet.text(28, 50, f'worst prompt: "{c.prompts[i]}", seed {c.seeds[i]}', 16, sheets.FAINT)
    for row, name in enumerate(("uncached", c.accelerated.name, f"difference x {gain}")):
        sheet.text(28, top + row * (tile_h + _GAP) + tile_h // 2, name, 15, sheets.INK, "lm")
    figures = c.frames_db(i)
    for column, f in enumerate(chosen):
        x = left + column * (tile_w + _GAP)
        for row, tile in enumerate(tiles[column]):
            sheet.image.paste(tile, (x, top + row * (tile_h + _GAP)))
        y = top + 3 * (tile_h + _GAP) + 2
        sheet.text(x, y, f"frame {f}: {_decibels(figures[f])}", 14)
    return sheet.image


def mp4(frames: list[Image.Image], path: Path, about: Mapping[str, Any]) -> bool:
    """Write the frames to `path`, complete or not at all; False where there is no ffmpeg."""
    if not _has_ffmpeg():
        return False
    # `generate` imports the writer of comparisons, which imports this.
    from blockcache.pipelines.generate import files

    pixels = np.stack([np.asarray(frame, np.float32) / np.float32(255) for frame in frames])
    files.save(pixels, path, about, FPS)
    return True


def gif(frames: list[Image.Image]) -> bytes:
    """The frames as a GIF, 256 colours each, for where there is no ffmpeg."""
    buffer = io.BytesIO()
    first, *rest = frames
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=1000 // FPS, loop=0)
    return buffer.getvalue()


def _has_ffmpeg() -> bool:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    return True


def _row(c: Comparison, i: int) -> list[Image.Image]:
    before, after = c.baseline.pictures[i], c.accelerated.pictures[i]
    gain = sheets.gain(before, after)
    seconds = [float(np.median(entry.seconds[i])) for entry in (c.baseline, c.accelerated)]
    figures = c.frames_db(i)
    name = f"{c.accelerated.name} {seconds[1]:.1f} s \u00b7 {seconds[0] / seconds[1]:.1f}x"
    return [
        _beside(
            [
                sheets.labelled(before[f], f"uncached {seconds[0]:.1f} s"),
                sheets.labelled(after[f], f"{name} \u00b7 {_decibels(figures[f])}"),
                sheets.labelled(np.abs(after[f] - before[f]) * gain, f"difference x {gain}"),
            ]
        )
        for f in range(len(before))
    ]


def _beside(images: list[Image.Image]) -> Image.Image:
    width = sum(image.width for image in images) + _GAP * (len(images) - 1)
    page = Image.new("RGB", (width, images[0].height), sheets.PAPER)
    x = 0
    for image in images:
        page.paste(image, (x, 0))
        x += image.width + _GAP
    return page


def _below(images: tuple[Image.Image, ...]) -> Image.Image:
    height = sum(image.height for image in images) + _GAP * (len(images) - 1)
    page = Image.new("RGB", (images[0].width, height), sheets.PAPER)
    y = 0
    for image in images:
        page.paste(image, (0, y))
        y += image.height + _GAP
    return page


def _decibels(value: float) -> str:
    return "identical" if value >= CAP_DB else f"{value:.1f} dB"
