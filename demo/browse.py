"""Folders made by `blockcache compare` and `blockcache generate`, looked at without any model."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from blockcache.demo import media, panels
from blockcache.demo.visits import Visit
from blockcache.errors import BlockCacheError
from blockcache.pipelines.compare import FIGURES
from blockcache.pipelines.generate import manifest
from blockcache.tuning.quality import Scores

PER_PAGE = 24
ORDERS = ("as given", "worst first", "fastest first")

_MOST_ITEMS = 5000
_MOST_FIGURES_BYTES = 64 * 2**20
_THUMB_PX = 192


class FolderError(BlockCacheError):
    """A folder that cannot be browsed."""


@dataclass(frozen=True)
class Item:
    """One picture or video of a folder. plain: its uncached twin, None where none was made.

    error: why there is no picture.
    """

    number: int
    name: str
    prompt: str
    seed: int
    plan: str
    file: Path | None
    plain: Path | None
    seconds: float | None
    baseline_s: float | None
    psnr_db: float | None
    ssim: float | None
    computed: float | None
    error: str = ""

    @property
    def speedup(self) -> float | None:
        """Times as fast as uncached; None where that was not measured."""
        return self.baseline_s / self.seconds if self.baseline_s and self.seconds else None


@dataclass(frozen=True)
class Folder:
    """A folder and what is in it."""

    path: Path
    about: str
    items: tuple[Item, ...]

    def ordered(self, order: str) -> list[Item]:
        """The items in one of `ORDERS`."""
        if order == "worst first":
            return sorted(self.items, key=lambda item: _or_last(item.psnr_db))
        if order == "fastest first":
            return sorted(self.items, key=lambda item: _or_last(item.seconds))
        return list(self.items)


def _or_last(value: float | None) -> float:
    return float("inf") if value is None else value


def folders_in(path: Path) -> list[Path]:
    """The folder itself, or those in it, that can be browsed.

    Raises:
        FolderError: there is none.
    """
    if not path.is_dir():
        found = "a file" if path.is_file() else "nothing"
        raise FolderError(f"cannot browse {path}: found {found}, expected a folder")
    found_here = [folder for folder in (path, *sorted(path.iterdir())) if _kind(folder)]
    if not found_here:
        raise FolderError(
            f"nothing to browse in {path}: no {FIGURES} of `blockcache compare` and no "
            f"{manifest.NAME} of `blockcache generate` here or one folder below"
        )
    return found_here


def _kind(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    if (folder / FIGURES).is_file():
        return "compare"
    return "generate" if manifest.files(folder) else ""


def read(folder: Path) -> Folder:
    """What is in a folder.

    Raises:
        FolderError: it cannot be read.
    """
    try:
        return _of_compare(folder) if _kind(folder) == "compare" else _of_generate(folder)
    except FolderError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"cannot read {folder}: {type(error).__name__}: {error}") from None


def _of_compare(folder: Path) -> Folder:
    file = folder / FIGURES
    if file.stat().st_size > _MOST_FIGURES_BYTES:
        raise FolderError(f"{file} is larger than {_MOST_FIGURES_BYTES >> 20} MiB; not read")
    figures = json.loads(file.read_text(encoding="utf-8"))
    items = [
        _compared(folder, i, figures["recipe"], row)
        for i, row in enumerate(figures["items"][:_MOST_ITEMS])
    ]
    about = (
        f"{figures['recipe']} on {figures['model']}, {figures['steps']} steps: "
        f"{figures['speedup']:.2f} times as fast, median of {len(items)}"
    )
    return Folder(folder, about, tuple(items))


def _compared(folder: Path, number: int, plan: str, row: dict[str, Any]) -> Item:
    pictures = sorted(folder.glob(f"{number:03d}-*.png"))
    plain = [path for path in pictures if path.stem.endswith("-uncached")]
    fast = [path for path in pictures if path not in plain]
    return Item(
        number=number,
        name=f"{number:03d}",
        prompt=str(row["prompt"]),
        seed=int(row["seed"]),
        plan=plan,
        file=fast[0] if fast else None,
        plain=plain[0] if plain else None,
        seconds=statistics.median(row["accelerated_s"]),
        baseline_s=statistics.median(row["baseline_s"]),
        psnr_db=row["psnr_db"],
        ssim=row["ssim"],
        computed=row["computed_fraction"],
        error="" if fast else "the picture is missing",
    )


def _of_generate(folder: Path) -> Folder:
    rows = [json.loads(line) for line in islice(manifest.latest(folder), _MOST_ITEMS)]
    items = tuple(_generated(folder, number, row) for number, row in enumerate(rows))
    done = sum(not item.error for item in items)
    model = next((str(row.get("model", "")) for row in rows), "")
    return Folder(folder, f"{done} of {len(items)} done with {model}", items)


def _generated(folder: Path, number: int, row: dict[str, Any]) -> Item:
    file = _within(folder, row.get("file"))
    reuse = row.get("reuse")
    return Item(
        number=number,
        name=str(row["id"]),
        prompt=str(row.get("prompt", "")),
        seed=int(row.get("seed", 0)),
        plan=str(row.get("plan", "")),
        file=file,
        plain=_within(folder, row.get("baseline_file")),
        seconds=row.get("seconds"),
        baseline_s=row.get("baseline_s"),
        psnr_db=row.get("psnr_db"),
        ssim=row.get("ssim"),
        computed=None if reuse is None else 1 - float(reuse),
        error="" if file else str(row.get("error") or "the picture is missing"),
    )


def _within(folder: Path, name: object) -> Path | None:
    """A file of the folder; a manifest may name what it likes, and gets nothing else."""
    if not isinstance(name, str) or not name:
        return None
    path = (folder / name).resolve()
    is_ours = path.is_relative_to(folder.resolve()) and path.suffix in (".png", ".mp4")
    return path if is_ours and path.is_file() else None


# ---- the page -----------------------------------------------------------------------------------


def grid(items: Sequence[Item], page: int) -> str:
    """One page of small pictures; each can be opened."""
    shown = items[page * PER_PAGE : (page + 1) * PER_PAGE]
    return f'<div class="bc-grid-of">{"".join(map(_card, shown))}</div>'


def pages(items: Sequence[Item]) -> int:
    """How many there are, at least one."""
    return max(1, -(-len(items) // PER_PAGE))


def _card(item: Item) -> str:
    prompt = escape(panels.short(item.prompt, 90))
    if item.file is None:
        why = escape(item.error[:300])
        return f'<div class="bc-tile bc-missing"><p>{why}</p><p>{prompt}</p></div>'
    image = _thumbnail(str(item.file), item.file.stat().st_mtime_ns)
    return (
        f'<button type="button" class="bc-tile" data-item="{item.number}">'
        f'<img src="{image}" alt="" loading="lazy"><span>{prompt}</span>'
        f"<small>{escape(_figures(item))}</small></button>"
    )


def _figures(item: Item) -> str:
    known = (
        "" if item.seconds is None else f"{item.seconds:.2f} s",
        "" if item.speedup is None else f"{item.speedup:.2f}x",
        _decibels(item),
        "" if item.computed is None else f"{item.computed:.0%} computed",
    )
    return ", ".join(filter(None, known))


def _decibels(item: Item) -> str:
    return "" if item.psnr_db is None else panels.decibels(_scores(item))


@lru_cache(maxsize=512)
def _thumbnail(path: str, changed: int) -> str:
    try:
        return media.data_url(media.thumbnail(Path(path), _THUMB_PX))
    # A broken file is shown as one; the others are fine.
    except (OSError, ValueError, StopIteration):
        return ""


def opened(item: Item, visit: Visit) -> str:
    """One item, large: as a pair where there is an uncached twin.

    Raises:
        FolderError: its files cannot be read.
    """
    if item.file is None:
        raise FolderError(item.error)
    place = visit.folder / f"browse-{item.number}-{abs(hash(item.file)) % 10**8}"
    link = panels.link_to(place)
    words = panels.said((f"“{panels.short(item.prompt)}”, seed {item.seed}.",))
    try:
        fast = media.read(item.file)
        plain = None if item.plain is None else media.read(item.plain)
    except (OSError, ValueError, StopIteration) as error:
        raise FolderError(f"cannot read {item.name}: {error}") from None
    about = {"prompt": item.prompt, "seed": item.seed}
    if plain is None or plain.shape != fast.shape:
        name = media.write_alone(place, fast, f"{item.plan}  {item.seconds or 0:.2f} s", about)
        return panels.alone(link(name), item.prompt, fast.ndim == 4) + words + _numbers(item)
    shot = media.write_pair(
        place,
        (plain, f"uncached  {item.baseline_s or 0:.2f} s"),
        (fast, f"{item.plan}  {item.seconds or 0:.2f} s"),
        about,
        item.plan,
    )
    alike = "" if item.psnr_db is None else panels.likeness(_scores(item), is_video=shot.is_video)
    return (
        panels.verdict(item.speedup, alike)
        + panels.both(shot, item.plan, item.prompt, link, words)
        + _numbers(item)
    )


def _scores(item: Item) -> Scores:
    return Scores(item.psnr_db or 0.0, item.ssim or 0.0, None)


def _numbers(item: Item) -> str:
    """The line of numbers, as far as they are known."""
    before = "" if item.baseline_s is None else f"uncached {item.baseline_s:.2f} s"
    tiles = (
        ("Seconds", "" if item.seconds is None else f"{item.seconds:.2f} s", before),
        ("Speed-up", "" if item.speedup is None else f"{item.speedup:.2f}x", "over uncached"),
        ("PSNR", _decibels(item), panels.PSNR_WORDS),
        ("SSIM", "" if item.ssim is None else f"{item.ssim:.4f}", panels.SSIM_WORDS),
        ("Computed", "" if item.computed is None else f"{item.computed:.0%}", "of the block calls"),
    )
    return panels.numbers(tile for tile in tiles if tile[1])


def numbers(items: Iterable[Item]) -> dict[int, Item]:
    """The items by number."""
    return {item.number: item for item in items}
