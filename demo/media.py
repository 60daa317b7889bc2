"""Pictures and videos for the page: named and timed on the picture itself, and lossless as PNG."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from blockcache.demo.preview import Small
from blockcache.errors import BlockCacheError
from blockcache.pipelines import sheets
from blockcache.pipelines.generate import files
from blockcache.pipelines.sheets import frames_of
from blockcache.tuning.comparison import Picture

FPS = 16
_SHOWN_PX, _FILMED_PX = 768, 512
"""Small pictures are enlarged to about this, in whole multiples, so that pixels stay sharp. Films
less, as they stand side by side and take long to encode."""
_GAP_PX = 8

Corner = Literal["left", "right"]


@dataclass(frozen=True)
class Label:
    """What stands on a picture, in which of its upper corners.

    is_alone: no other label lies on top, so it may be larger.
    """

    text: str
    corner: Corner = "left"
    is_alone: bool = False


def still(picture: Picture, frame: int) -> Picture:
    """A picture itself, or one frame of a video."""
    return picture if picture.ndim == 3 else picture[frame]


def farthest_frame(picture: Picture, reference: Picture) -> int:
    """The frame of a video that differs most; 0 of a picture."""
    if picture.ndim == 3:
        return 0
    return int(((picture - reference) ** 2).mean((1, 2, 3)).argmax())


def difference(picture: Picture, reference: Picture) -> tuple[Picture, int]:
    """The absolute difference of two pictures `[H, W, C]`, brightened; and how many times."""
    gain = sheets.gain(reference, picture)
    return np.clip(np.abs(picture - reference) * gain, 0, 1), gain


def shown(picture: Picture, label: Label | None = None) -> Image.Image:
    """One picture `[H, W, C]`, enlarged if it is small, with its label."""
    return _finished(frames_of(picture)[0], label, _SHOWN_PX)


def _finished(image: Image.Image, label: Label | None, longest: int) -> Image.Image:
    if longest >= 2 * max(image.size):
        image = sheets.scaled(np.asarray(image), longest)
    return image if label is None else _labelled(image, label)


def _film(video: Picture, label: Label) -> list[Image.Image]:
    return [_finished(image, label, _FILMED_PX) for image in frames_of(video)]


def _labelled(image: Image.Image, label: Label) -> Image.Image:
    # Two labels on pictures that lie on top of each other share the width.
    room = image.width * (0.94 if label.is_alone else 0.47)
    points = max(10, round(image.width / (17 if label.is_alone else 26)))
    text = label.text.encode("latin-1", "replace").decode("latin-1")
    while points > 8 and _font(points).getlength(text) > room - 2 * points:
        points -= 1
    while len(text) > 4 and _font(points).getlength(text) > room - 2 * points:
        text = text[:-4].rstrip(" .") + "..."
    font, pad = _font(points), points // 2
    ink = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(ink)
    width, height = font.getlength(text) + 2 * pad, round(points * 1.9)
    left = pad if label.corner == "left" else image.width - pad - width
    box = (left, pad, left + width, pad + height)
    # The rim tells it from a dark picture.
    draw.rounded_rectangle(box, height // 4, fill=(16, 18, 22, 205), outline=(255, 255, 255, 60))
    draw.text((left + pad, pad + height / 2), text, font=font, fill="white", anchor="lm")
    return Image.alpha_composite(image.convert("RGBA"), ink).convert("RGB")


def _font(points: int) -> Any:
    return ImageFont.load_default(points)


@dataclass(frozen=True)
class Shot:
    """A pair on disk. files: by kind, names within its folder. size: width and height.

    gain: of the difference picture. frame: that it shows, of a video. is_same: nothing differs.
    """

    files: dict[str, str]
    size: tuple[int, int]
    gain: int
    frame: int
    is_video: bool
    is_same: bool


def write_pair(
    folder: Path,
    plain: tuple[Picture, str],
    fast: tuple[Picture, str],
    about: dict[str, Any],
    plan: str,
) -> Shot:
    """Write both pictures or videos with their labels, and their difference, to a new folder.

    Kinds of files: "uncached" and "cached" with labels, "difference"; of pictures "uncached_as_is"
    and "cached_as_is"; of videos "both", side by side, and the first frames as "uncached_poster"
    and "cached_poster".

    Raises:
        BlockCacheError: videos, and there is no video writer.
    """
    folder.mkdir(exist_ok=True)
    is_video = plain[0].ndim == 4
    # Players stand side by side, and may be small.
    left = Label(plain[1], is_alone=is_video)
    right = Label(fast[1], "left" if is_video else "right", is_alone=is_video)
    frame = farthest_frame(fast[0], plain[0])
    apart, gain = difference(still(fast[0], frame), still(plain[0], frame))
    made = {"difference": _png(shown(apart), folder / "difference")}
    for kind, picture, label in (("uncached", plain[0], left), ("cached", fast[0], right)):
        notes = {**about, "plan": plan if kind == "cached" else "none"}
        if is_video:
            frames = _film(picture, label)
            made[kind] = _mp4(frames, folder / kind, notes)
            made[f"{kind}_poster"] = _png(frames[0], folder / f"{kind}-poster")
        else:
            made[kind] = _png(shown(picture, label), folder / f"{kind}-labelled")
            made[f"{kind}_as_is"] = _saved(picture, folder / kind, notes)
    if is_video:
        both = _side_by_side((plain[0], left), (fast[0], right))
        made["both"] = _mp4(both, folder / "side-by-side", about)
    size = (plain[0].shape[-2], plain[0].shape[-3])
    return Shot(made, size, gain, frame, is_video, bool((plain[0] == fast[0]).all()))


def write_alone(folder: Path, picture: Picture, text: str, about: dict[str, Any]) -> str:
    """Write a picture or video that has no twin to a new folder; returns the file's name."""
    folder.mkdir(exist_ok=True)
    if picture.ndim == 3:
        return _png(shown(picture, Label(text)), folder / "picture")
    return _mp4(_film(picture, Label(text, is_alone=True)), folder / "video", about)


def _png(image: Image.Image, stem: Path) -> str:
    path = stem.with_name(f"{stem.name}.png")
    # To look at, at once: twice as large as it could be, and written several times as fast.
    image.save(path, "PNG", compress_level=1)
    return path.name


def _side_by_side(left: tuple[Picture, Label], right: tuple[Picture, Label]) -> list[Image.Image]:
    """Both videos as one, always in step."""
    frames = []
    for one, other in zip(_film(*left), _film(*right), strict=True):
        wide = Image.new("RGB", (one.width + other.width + _GAP_PX, one.height), "#101216")
        wide.paste(one, (0, 0))
        wide.paste(other, (one.width + _GAP_PX, 0))
        frames.append(wide)
    return frames


def _mp4(frames: list[Image.Image], stem: Path, about: dict[str, Any]) -> str:
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise BlockCacheError(
            "videos need imageio and ffmpeg: pip install 'blockcache[video]'"
        ) from None
    return _saved(_as_floats(frames), stem, about)


def _saved(picture: Picture, stem: Path, about: dict[str, Any]) -> str:
    path = stem.with_name(stem.name + files.ending(picture))
    files.save(picture, path, about, FPS)
    return path.name


def _as_floats(frames: Sequence[Image.Image | NDArray[np.uint8]]) -> Picture:
    video = np.stack([np.asarray(frame) for frame in frames]).astype(np.float32)
    scaled: Picture = np.divide(video, 255, dtype=np.float32)
    return scaled


def data_url(pixels: Small | NDArray[np.uint8]) -> str:
    """A small picture as a link that holds it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(path: Path, longest: int) -> NDArray[np.uint8]:
    """A small picture of a PNG or of a video's middle frame."""
    return np.asarray(files.thumbnail(path, longest).convert("RGB"))


def read(path: Path) -> Picture:
    """A PNG, or all frames of an animated PNG or an mp4, as float in 0..1."""
    if path.suffix == ".mp4":
        return _read_mp4(path)
    with Image.open(path) as image:
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(image.convert("RGB"))
    return _as_floats(frames)[0] if len(frames) == 1 else _as_floats(frames)


def _read_mp4(path: Path) -> Picture:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return _as_floats([np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader])
