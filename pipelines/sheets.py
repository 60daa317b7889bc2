"""Pictures about pictures: side by side with the figures written on them, and the map of blocks.

Drawn with Pillow alone. Its built-in font knows no multiplication sign, hence the plain x.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

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
# From hardly anything to nearly all of an attention.
SPARSE = ("#e4f3ec", "#0f7a5a")

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
    sheet = Sheet(width, 2 * _MARGIN + 58 + row_px * len(rows) + 26)
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
        [scaled(as_8bit(frame_of(entry.pictures[i])), 192) for entry in (c.baseline, c.accelerated)]
        for i in range(len(c.prompts))
    ]
    tile_w, tile_h = tiles[0][0].size
    columns = min(8, len(tiles))
    rows = -(-len(tiles) // columns)
    pair_px = 2 * tile_h + 34 + 20
    width = 2 * _MARGIN + columns * (tile_w + _GAP) - _GAP
    sheet = Sheet(max(width, 620), 2 * _MARGIN + 40 + rows * pair_px)
    title = f"above: uncached, below: {c.accelerated.name} ({c.speedup():.2f}x)"
    sheet.text(_MARGIN, _MARGIN - 6, title, 22)
    for i, (above, below) in enumerate(tiles):
        x = _MARGIN + (i % columns) * (tile_w + _GAP)
        y = _MARGIN + 40 + (i // columns) * pair_px
        sheet.image.paste(above, (x, y))
        sheet.text(x + 2, y + tile_h + 7, decibels(c.accelerated, i), 17)
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
    sheet = Sheet(width, top + panel_px * len(panels) + 4)
    sheet.text(_MARGIN, _MARGIN - 6, headline(c), 26)
    share = f"{c.computed_fraction:.0%} of the block calls computed"
    sheet.text(_MARGIN, _MARGIN + 28, f"{share}, cache {size(c.cache_bytes)}", 16, FAINT)
    _legend(sheet, _MARGIN + 58)
    for number, panel in enumerate(panels):
        _draw_panel(sheet, panel, left, top + number * panel_px, cell_w, cell_h)
    return sheet.image


def density(c: Comparison) -> Image.Image | None:
    """How much of each attention was computed in which step; None where none was sparse."""
    models = [m for m in c.summaries[c.accelerated.typical]["models"] if _density_map(m)]
    if not models:
        return None
    panels = [(_density_panel(model), model["attention"]) for model in models]
    steps, blocks = (max(panel.map.shape[axis] for panel, _ in panels) for axis in (1, 0))
    cell_w, cell_h = max(6, min(22, 1100 // steps)), max(15, min(22, 480 // blocks))
    left, top, below = _MARGIN + 64, _MARGIN + 110, 74
    panel_px = blocks * cell_h + below + 16
    sheet = Sheet(max(left + steps * cell_w + 190, 820), top + panel_px * len(panels) + 4)
    sheet.text(_MARGIN, _MARGIN - 6, headline(c), 26)
    kept = ", ".join(f"{figures['density']:.2f}" for _, figures in panels)
    says = f"{panels[0][1]['planner']}: mean density of sparse attention {kept}"
    sheet.text(_MARGIN, _MARGIN + 28, says, 16, FAINT)
    _density_legend(sheet, _MARGIN + 58)
    for number, (panel, figures) in enumerate(panels):
        panel = panel if len(panels) > 1 else replace(panel, title="")
        y = top + number * panel_px
        _draw_panel(sheet, panel, left, y, cell_w, cell_h)
        _draw_layers(sheet, figures["layers"], left + steps * cell_w + 14, y, cell_h)
    return sheet.image


def _density_map(model: dict[str, Any]) -> list[list[float | None]]:
    found: list[list[float | None]] = (model.get("attention") or {}).get("map", [])
    return found


def _density_panel(model: dict[str, Any]) -> "Panel":
    """`[blocks, steps]`: a density, 1 where dense, -1 where no branch computed the block."""
    computed = np.array([branch["map"] for branch in model["branches"]]).max(0)
    cells = np.where(computed > 0, 1.0, -1.0)
    for step, row in enumerate(_density_map(model)):
        for block, found in enumerate(row):
            if found is not None:
                cells[step, block] = found
    return Panel(model["part"], cells.T)


def _draw_layers(
    sheet: "Sheet", layers: list[dict[str, Any]], x: int, top: int, cell_h: int
) -> None:
    """Mean density and sampled recall beside each layer's row."""
    sheet.text(x, top - 18, "density  recall", 13, FAINT)
    for row in layers:
        y = top + row["layer"] * cell_h + cell_h // 2
        for offset, value in ((0, row["density"]), (62, row["recall"])):
            sheet.text(x + offset, y, "-" if value is None else f"{value:.2f}", 13, INK, "lm")


def _density_legend(sheet: "Sheet", y: int) -> None:
    x = _MARGIN
    for color, label in ((COMPUTED, "dense"), (REUSED, "reused")):
        _swatch(sheet, x, y, color, label)
        x += 110
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        _swatch(sheet, x, y, color_of(share), f"{share:.1f}", gap=6)
        x += 58
    sheet.text(x, y + 8, "sparse, by density", 16, INK, "lm")


def color_of(cell: float) -> str | tuple[int, ...]:
    """What a cell of a map is drawn in: -1 and 0 reused, 1 computed, between them sparse."""
    if cell <= 0:
        return REUSED
    if cell >= 1:
        return COMPUTED
    low, high = (np.array(ImageColor.getrgb(color)) for color in SPARSE)
    return tuple(int(value) for value in np.rint(low + (high - low) * cell))


def headline(c: Comparison) -> str:
    """One line: what was compared, and what came of it."""
    psnr = c.accelerated.spread("psnr_db") or {"median": CAP_DB}
    return f"{c.accelerated.name} on {c.model}: {c.speedup():.2f}x, {psnr['median']:.1f} dB"


@dataclass(frozen=True, eq=False)
class Panel:
    """One map `[blocks, steps]`, 1 where computed, and the branches that share it.

    Where attention was sparse, its density.
    """

    title: str
    map: NDArray[Any]


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
    sheet: "Sheet", panel: Panel, left: int, top: int, cell_w: int, cell_h: int
) -> None:
    blocks, steps = panel.map.shape
    gap = 1 if min(cell_w, cell_h) < 8 else 2
    for block in range(blocks):
        for step in range(steps):
            x, y = left + step * cell_w, top + block * cell_h
            corner = x + cell_w - gap - 1, y + cell_h - gap - 1
            sheet.draw.rectangle((x, y, *corner), fill=color_of(panel.map[block, step]))
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


def _legend(sheet: "Sheet", y: int) -> None:
    x = _MARGIN
    for color, label in ((COMPUTED, "computed"), (REUSED, "reused")):
        _swatch(sheet, x, y, color, label)
        x += 125


def _swatch(
    sheet: "Sheet", x: int, y: int, color: str | tuple[int, ...], label: str, gap: int = 8
) -> None:
    """A square of a legend and its word."""
    sheet.draw.rectangle((x, y, x + 15, y + 15), fill=color)
    sheet.text(x + 15 + gap, y + 8, label, 16, INK, "lm")


def _ticks(count: int) -> list[int]:
    """Numbers worth writing along an axis: about ten, round."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if count <= 12 * n or n == 500)
    return list(range(0, count, every))


def _row_of_tiles(c: Comparison, i: int) -> list[Image.Image]:
    reference, picture = (frame_of(e.pictures[i]) for e in (c.baseline, c.accelerated))
    before, after = (float(np.median(e.seconds[i])) for e in (c.baseline, c.accelerated))
    times = gain(reference, picture)
    figures = f"{after:.2f} s · {before / after:.1f}x · {decibels(c.accelerated, i)}"
    return [
        labelled(reference, f"uncached {before:.2f} s"),
        labelled(picture, f"{c.accelerated.name} {figures}"),
        labelled(np.abs(picture - reference) * times, f"difference x {times}"),
    ]


def gain(reference: Picture, picture: Picture) -> int:
    """For differences: the power of two that makes the difference visible; 1 to 64."""
    largest = float(np.quantile(np.abs(picture - reference), 0.999))
    return int(2 ** np.clip(np.floor(np.log2(1 / max(largest, 1e-6))), 0, 6))


def labelled(picture: Picture, label: str) -> Image.Image:
    """A picture at the size of a tile with a few words on it."""
    tile = scaled(as_8bit(picture), _TILE_PX).convert("RGBA")
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


def scaled(picture: Bytes, target: int) -> Image.Image:
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


def decibels(entry: Entry, i: int) -> str:
    """The PSNR of item `i` in words."""
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


class Sheet:
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
