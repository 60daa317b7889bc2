"""Pictures about pictures: side by side with the figures written on them, and the map of blocks.

Drawn with Pillow alone. Its built-in font knows no multiplication sign, hence the plain x.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from blockcache.tuning.comparison import Comparison, Entry, Picture, size
from blockcache.tuning.quality import CAP_DB

Bytes = NDArray[np.uint8]

PAPER = "#ffffff"
INK = "#1f2328"
FAINT = "#6a737d"
RULE = "#d8dee4"
# Blue and orange of Okabe and Ito's palette, told apart by lightness too.
COMPUTED = "#0b4f8a"
REUSED = "#f5c77e"

_TILE_PX = 384
_MARGIN = 28
_GAP = 12


def as_8bit(picture: Picture) -> Bytes:
    """Float in 0..1 to 8 bits, rounded; only ever for files, never for figures."""
    rounded: Bytes = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return rounded


def frames_of(picture: Picture) -> list[Image.Image]:
    """The picture, or all frames of a video, as 8-bit images."""
    frames = picture[None] if picture.ndim == 3 else picture
    return [_image(as_8bit(frame)) for frame in frames]


def frame_of(picture: Picture) -> Picture:
    """The picture itself, or the middle frame of a video."""
    return picture if picture.ndim == 3 else picture[len(picture) // 2]


def side_by_side(c: Comparison) -> Image.Image:
    """Uncached, accelerated and their difference, for the median prompt and the worst one."""
    fast = c.accelerated
    rows = [("", fast.worst)] if len(c.prompts) == 1 else []
    if not rows:
        rows = [("median prompt: ", fast.typical), ("worst prompt: ", fast.worst)]
    tiles = [_row_of_tiles(c, i) for _, i in rows]
    width = 2 * _MARGIN + sum(tile.width for tile in tiles[0]) + 2 * _GAP
    row_px = 34 + tiles[0][0].height + 22
    sheet = _Sheet(width, 2 * _MARGIN + 58 + row_px * len(rows) + 26)
    sheet.text(_MARGIN, _MARGIN - 6, headline(c), 26)
    sheet.text(_MARGIN, _MARGIN + 28, _subtitle(c), 16, FAINT)
    y = _MARGIN + 62
    for (title, i), row in zip(rows, tiles, strict=True):
        sheet.text(_MARGIN, y + 6, f'{title}"{c.prompts[i]}", seed {c.seeds[i]}', 17)
        x = _MARGIN
        for tile in row:
            sheet.image.paste(tile, (x, y + 34))
            x += tile.width + _GAP
        y += row_px
    sheet.text(_MARGIN, y, _footer(c), 14, FAINT)
    return sheet.image


def all_pairs(c: Comparison) -> Image.Image:
    """Every prompt: the uncached picture above, the accelerated one below, decibels between."""
    tiles = [
        [
            _scaled(as_8bit(frame_of(entry.pictures[i])), 192)
            for entry in (c.baseline, c.accelerated)
        ]
        for i in range(len(c.prompts))
    ]
    tile_w, tile_h = tiles[0][0].size
    columns = min(8, len(tiles))
    rows = -(-len(tiles) // columns)
    pair_px = 2 * tile_h + 34 + 20
    width = 2 * _MARGIN + columns * (tile_w + _GAP) - _GAP
    sheet = _Sheet(max(width, 620), 2 * _MARGIN + 40 + rows * pair_px)
    title = f"above: uncached, below: {c.accelerated.name} ({c.speedup():.2f}x)"
    sheet.text(_MARGIN, _MARGIN - 6, title, 22)
    for i, (above, below) in enumerate(tiles):
        x = _MARGIN + (i % columns) * (tile_w + _GAP)
        y = _MARGIN + 40 + (i // columns) * pair_px
        sheet.image.paste(above, (x, y))
        sheet.text(x + 2, y + tile_h + 7, _decibels(c.accelerated, i), 17)
        sheet.image.paste(below, (x, y + tile_h + 34))
    return sheet.image


def strip(c: Comparison) -> Image.Image:
    """Which block was computed in which step: steps to the right, blocks downwards."""
    panels = panels_of(c.summaries[c.accelerated.typical])
    steps, blocks = max(p.map.shape[1] for p in panels), max(p.map.shape[0] for p in panels)
    cell_w, cell_h = max(6, min(22, 1100 // steps)), max(4, min(22, 480 // blocks))
    left, top, below = _MARGIN + 64, _MARGIN + 92, 58
    panel_px = blocks * cell_h + below + 16
    width = max(left + steps * cell_w + _MARGIN, 760)
    sheet = _Sheet(width, top + panel_px * len(panels) + 4)
    sheet.text(_MARGIN, _MARGIN - 6, headline(c), 26)
    share = f"{c.computed_fraction:.0%} of the block calls computed"
    sheet.text(_MARGIN, _MARGIN + 28, f"{share}, cache {size(c.cache_bytes)}", 16, FAINT)
    _legend(sheet, _MARGIN + 58)
    for number, panel in enumerate(panels):
        _draw_panel(sheet, panel, left, top + number * panel_px, cell_w, cell_h)
    return sheet.image


def headline(c: Comparison) -> str:
    """One line: what was compared, and what came of it."""
    psnr = c.accelerated.spread("psnr_db") or {"median": CAP_DB}
    return f"{c.accelerated.name} on {c.model}: {c.speedup():.2f}x, {psnr['median']:.1f} dB"


@dataclass(frozen=True, eq=False)
class Panel:
    """One map `[blocks, steps]`, 1 where computed, and the branches that share it."""

    title: str
    map: NDArray[np.int64]


def panels_of(summary: dict[str, Any]) -> list[Panel]:
    """The different maps of a run; branches that did the same share a panel."""
    panels: list[Panel] = []
    for model in summary["models"]:
        same: dict[bytes, tuple[NDArray[np.int64], list[str]]] = {}
        for branch in model["branches"]:
            rows = np.array(branch["map"], dtype=np.int64).T
            key = str(rows.shape).encode() + rows.tobytes()
            same.setdefault(key, (rows, []))[1].append(branch["name"])
        several = len(model["branches"]) > 1
        part = model["part"] if len(summary["models"]) > 1 else ""
        for rows, names in same.values():
            branches = f"branch {', '.join(names)}" if several else ""
            panels.append(Panel(" ".join(filter(None, (part, branches))), rows))
    return panels


def _draw_panel(
    sheet: "_Sheet", panel: Panel, left: int, top: int, cell_w: int, cell_h: int
) -> None:
    blocks, steps = panel.map.shape
    gap = 1 if min(cell_w, cell_h) < 8 else 2
    for block in range(blocks):
        for step in range(steps):
            x, y = left + step * cell_w, top + block * cell_h
            color = COMPUTED if panel.map[block, step] else REUSED
            sheet.draw.rectangle((x, y, x + cell_w - gap - 1, y + cell_h - gap - 1), fill=color)
    bottom = top + blocks * cell_h
    for step in _ticks(steps):
        sheet.text(left + step * cell_w + cell_w // 2, bottom + 4, str(step), 14, FAINT, "mt")
    for block in _ticks(blocks):
        y = top + block * cell_h + cell_h // 2
        sheet.text(left - 8, y, str(block), 14, FAINT, "rm")
    sheet.text(left + steps * cell_w // 2, bottom + 24, "step", 15, INK, "mt")
    sheet.text(_MARGIN, top + blocks * cell_h // 2, "block", 15, INK, "lm")
    if panel.title:
        sheet.text(left + steps * cell_w, bottom + 24, panel.title, 15, INK, "rt")


def _legend(sheet: "_Sheet", y: int) -> None:
    x = _MARGIN
    for color, label in ((COMPUTED, "computed"), (REUSED, "reused")):
        sheet.draw.rectangle((x, y, x + 15, y + 15), fill=color)
        sheet.text(x + 23, y + 8, label, 16, INK, "lm")
        x += 125


def _ticks(count: int) -> list[int]:
    """Numbers worth writing along an axis: about ten, round."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if count <= 12 * n or n == 500)
    return list(range(0, count, every))


def _row_of_tiles(c: Comparison, i: int) -> list[Image.Image]:
    reference, picture = (frame_of(e.pictures[i]) for e in (c.baseline, c.accelerated))
    before, after = (float(np.median(e.seconds[i])) for e in (c.baseline, c.accelerated))
    gain = _gain(reference, picture)
    figures = f"{after:.2f} s · {before / after:.1f}x · {_decibels(c.accelerated, i)}"
    return [
        _labelled(reference, f"uncached {before:.2f} s"),
        _labelled(picture, f"{c.accelerated.name} {figures}"),
        _labelled(np.abs(picture - reference) * gain, f"difference x {gain}"),
    ]


def _gain(reference: Picture, picture: Picture) -> int:
    """The power of two that makes the difference visible; 1 to 64."""
    largest = float(np.quantile(np.abs(picture - reference), 0.999))
    return int(2 ** np.clip(np.floor(np.log2(1 / max(largest, 1e-6))), 0, 6))


def _labelled(picture: Picture, label: str) -> Image.Image:
    tile = _scaled(as_8bit(picture), _TILE_PX).convert("RGBA")
    ink = Image.new("RGBA", tile.size)
    draw = ImageDraw.Draw(ink)
    font = _font(_fitting(label, 19, tile.width - 36))
    left, top, right, bottom = draw.textbbox((18, 17), label, font=font)
    draw.rounded_rectangle((left - 9, top - 8, right + 9, bottom + 8), 7, fill=(16, 18, 22, 205))
    draw.text((18, 17), label, font=font, fill="white")
    return Image.alpha_composite(tile, ink).convert("RGB")


def _fitting(text: str, size: int, width: int) -> int:
    while size > 9 and _font(size).getlength(text) > width:
        size -= 1
    return size


def _scaled(picture: Bytes, target: int) -> Image.Image:
    """About `target` pixels large; small pictures in whole multiples, so that pixels stay sharp."""
    image = _image(picture)
    longest = max(image.size)
    if longest <= target:
        factor = target // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    ratio = target / longest
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _image(picture: Bytes) -> Image.Image:
    """RGB, also from a grey picture `[H, W, 1]` or one with transparency."""
    return Image.fromarray(picture if picture.shape[-1] > 1 else picture[..., 0]).convert("RGB")


def _decibels(entry: Entry, i: int) -> str:
    scores = entry.scores[i]
    return "identical" if scores.is_identical else f"{scores.psnr_db:.1f} dB"


def _subtitle(c: Comparison) -> str:
    psnr = c.accelerated.spread("psnr_db") or {"median": CAP_DB, "worst": CAP_DB}
    prompts = f"{len(c.prompts)} prompt" + "s" * (len(c.prompts) > 1)
    times = f"{c.baseline.median_s:.2f} s to {c.accelerated.median_s:.2f} s"
    return f"{times}, median of {prompts}, {c.steps} steps; worst prompt {psnr['worst']:.1f} dB"


def _footer(c: Comparison) -> str:
    where = c.machine.get("gpu", c.machine["cpu"])
    frame = "" if c.baseline.pictures[0].ndim == 3 else "; middle frame shown"
    return f"{where}, {c.machine['dtype']}, torch {c.versions['torch']}{frame}"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


class _Sheet:
    """A white page to write on."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, x: int, y: int, text: str, points: int, color: str = INK, anchor: str = "la"
    ) -> None:
        """One line; made smaller if it would leave the page."""
        if anchor == "la":
            points = _fitting(text, points, self.image.width - x - _MARGIN)
        self.draw.text((x, y), text, font=_font(points), fill=color, anchor=anchor)
