"""A contact sheet (PNG) and a gallery (HTML) of a folder. Both open without a network."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont

from blockcache.pipelines import sheets
from blockcache.pipelines.generate.files import thumbnail

Rows: TypeAlias = Callable[[], Iterator[dict[str, Any]]]

SHEET, PAGE = "contact-sheet.png", "gallery.html"
_ON_SHEET, _ON_PAGE = 96, 1000
_TILE_PX, _GAP, _LABEL_PX, _MARGIN = 128, 12, 20, 28


def write(folder: Path, rows: Rows, lines: Sequence[str]) -> list[str]:
    """Write both; `lines` stand above. Returns the files' names."""
    done = (row for row in rows() if row["status"] == "done" and (folder / row["file"]).is_file())
    shown = list(islice(done, _ON_SHEET))
    made = []
    if shown:
        _put(folder / SHEET, lambda path: contact_sheet(folder, shown, lines).save(path, "PNG"))
        made.append(SHEET)
    page = html(list(islice(rows(), _ON_PAGE + 1)), lines)
    _put(folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))
    return [*made, PAGE]


def _put(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def contact_sheet(
    folder: Path, rows: Sequence[dict[str, Any]], lines: Sequence[str]
) -> Image.Image:
    """The first items as small pictures with their ids."""
    columns = min(8, max(4, len(rows)))
    tiles = [(row, thumbnail(folder / row["file"], _TILE_PX)) for row in rows]
    tall = max(tile.height for _, tile in tiles)
    row_px = tall + _LABEL_PX + _GAP
    top = _MARGIN + 26 * min(len(lines), 2) + 10
    width = 2 * _MARGIN + columns * (_TILE_PX + _GAP) - _GAP
    height = top + -(-len(tiles) // columns) * row_px + _MARGIN - _GAP
    sheet = Image.new("RGB", (width, height), sheets.PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines[:2]):
        color = sheets.FAINT if i else sheets.INK
        _write(draw, (_MARGIN, _MARGIN - 6 + 26 * i), line, 16, color, width - 2 * _MARGIN)
    for i, (row, tile) in enumerate(tiles):
        x = _MARGIN + (i % columns) * (_TILE_PX + _GAP)
        y = top + (i // columns) * row_px
        sheet.paste(tile, (x, y + tall - tile.height))
        label = row["id"] + (f"  {row['psnr_db']:.0f} dB" if "psnr_db" in row else "")
        _write(draw, (x, y + tall + 3), label, 12, sheets.FAINT, _TILE_PX)
    return sheet


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, points: int, color: str, room: int
) -> None:
    """One line, cut where the room ends; what the font lacks becomes a question mark."""
    font = ImageFont.load_default(points)
    text = text.encode("latin-1", "replace").decode("latin-1").replace("\n", " ")
    while font.getlength(text) > room and len(text) > 1:
        text = text[:-4].rstrip() + "..." if len(text) > 4 else text[:-1]
    draw.text(at, text, font=font, fill=color)


def html(rows: Sequence[dict[str, Any]], lines: Sequence[str]) -> str:
    """The page. Everything from outside is escaped; pictures are loaded as they come into view."""
    import jinja2

    more = len(rows) > _ON_PAGE
    items = [
        {**row, "src": _link(row.get("file")), "plain": _link(row.get("baseline_file"))}
        for row in rows[:_ON_PAGE]
    ]
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(_TEMPLATE).render(
        items=items, lines=lines, more=more, pairs=any(item["plain"] for item in items)
    )


def _link(file: str | None) -> str:
    return quote(file) if file else ""


_TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ lines[0] }}</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --faint: #6a737d; --rule: #d8dee4 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --faint: #9aa3ad; --rule: #3a4048 } }
body { margin: 28px; font: 15px/1.45 system-ui, sans-serif; color: var(--ink) }
header p { margin: 0; color: var(--faint) }
header p:first-child { font-size: 20px; color: var(--ink) }
main { display: grid; gap: 22px 16px; margin-top: 24px;
       grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)) }
figure { margin: 0; min-width: 0 }
.frame { position: relative; aspect-ratio: 1; background: #8881 }
.frame > * { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain }
.plain { opacity: 0 } .frame:hover .plain, .frame:focus .plain { opacity: 1 }
{% if items and items[0].settings.width | default(999) < 129 %}
img { image-rendering: pixelated }
{% endif %}
figcaption { font-size: 13px; overflow-wrap: anywhere; margin-top: 6px }
figcaption span { color: var(--faint); display: block }
.prompt { display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical;
          overflow: hidden }
.failed { border: 1px solid var(--rule); padding: 10px }
</style>
<header>
{% for line in lines %}
<p>{{ line }}</p>
{% endfor %}
{% if pairs %}
<p>Point at a picture to see it uncached; a click plays a video.
<label>Order: <select id="order">
<option value="row">as given<option value="psnr">worst first</select></label></p>
{% endif %}
{% if more %}
<p>Only the first {{ items | length }} are shown here; manifest.jsonl has all.</p>
{% endif %}
</header>
<main>
{% for item in items %}
<figure data-row="{{ item.row }}" data-psnr="{{ item.psnr_db | default(1000) }}">
{% if item.src %}
<div class="frame"{{ ' tabindex="0"' | safe if item.plain }}>
{% for source, kind in [(item.src, "cached"), (item.plain, "plain")] if source %}
{% if source.endswith(".mp4") %}
<video class="{{ kind }}" src="{{ source }}" preload="metadata"
 muted loop playsinline{{ " controls" if not item.plain }}></video>
{% else %}
<img class="{{ kind }}" src="{{ source }}" loading="lazy" alt="">
{% endif %}
{% endfor %}
</div>
{% else %}
<div class="failed">failed: {{ item.error }}</div>
{% endif %}
{% set prompt = item.prompt | truncate(500) %}
<figcaption><div class="prompt" title="{{ prompt }}">{{ prompt }}</div>
<span>{{ item.id | truncate(60) }} · seed {{ item.seed }} · {{ item.plan }}</span>
{% if item.src %}
<span>{{ "%.2f" | format(item.seconds) }} s · {{ "%.0f" | format(100 * item.reuse) }} % reused
{%- if item.psnr_db is defined %} · {{ "%.1f" | format(item.psnr_db) }} dB{% endif %}</span>
{% endif %}
</figcaption>
</figure>
{% endfor %}
</main>
{% if pairs %}
<script>
document.getElementById("order").onchange = (event) => {
  const main = document.querySelector("main"), key = event.target.value;
  [...main.children].sort((a, b) => a.dataset[key] - b.dataset[key]).forEach((x) => main.append(x));
};
// Both of a pair play at once, and pointing shows the other one.
document.querySelector("main").onclick = (event) => {
  const videos = [...(event.target.closest(".frame")?.querySelectorAll("video") ?? [])];
  const are_to_play = videos[0]?.paused;
  videos.forEach((video) => are_to_play ? video.play() : video.pause());
};
</script>
{% endif %}
</html>
"""
