"""Pictures and videos to files: whole or not at all, with what they were made from inside."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from blockcache.errors import BlockCacheError
from blockcache.pipelines.sheets import frames_of
from blockcache.tuning.comparison import Picture

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_QUALITY = 8


class StorageError(OSError):
    """The folder can no longer be written to; going on would fail for every item."""


def storage_error(error: OSError, folder: Path) -> StorageError:
    """What to say about a write that failed."""
    what = "the disk is full" if error.errno in _FULL else f"cannot write ({error.strerror})"
    return StorageError(
        f"{what}: {folder}; what is done is safe, make room and give the same command again"
    )


def needs_video_writer(pipe: Any) -> None:
    """See to it that videos can be written, before any is rendered.

    Raises:
        BlockCacheError: the pipeline makes videos and the writer is not installed.
    """
    import inspect

    if "num_frames" not in inspect.signature(type(pipe).__call__).parameters:
        return
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise BlockCacheError(
            "videos need imageio and ffmpeg: pip install 'blockcache[video]'"
        ) from None


def save(picture: Picture, path: Path, about: Mapping[str, Any], fps: int) -> Path:
    """Write `[H, W, C]` as PNG or `[F, H, W, C]` as mp4, float in 0..1; returns the file.

    path: without ending. about: what goes into the file as well, JSON under "blockcache" in a PNG
    and as the comment of an mp4; in a PNG "prompt" and "seed" also stand by themselves.
    """
    path = path.with_name(path.name + (".png" if picture.ndim == 3 else ".mp4"))
    partial = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        if picture.ndim == 3:
            _write_png(frames_of(picture)[0], partial, about)
        else:
            _write_mp4(frames_of(picture), partial, about, fps)
        _force_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write_png(image: Image.Image, path: Path, about: Mapping[str, Any]) -> None:
    info = PngInfo()
    for name in ("prompt", "seed"):
        info.add_itxt(name, str(about.get(name, "")).replace("\0", "\ufffd"))
    info.add_itxt("blockcache", json.dumps(about))
    image.save(path, "PNG", pnginfo=info)


def _write_mp4(frames: list[Image.Image], path: Path, about: Mapping[str, Any], fps: int) -> None:
    import imageio_ffmpeg
    import numpy as np

    writer = imageio_ffmpeg.write_frames(
        str(path),
        frames[0].size,
        fps=fps,
        quality=_QUALITY,
        # Players want even sides; a larger block would scale small videos.
        macro_block_size=2,
        output_params=["-metadata", f"comment={json.dumps(about)}", "-movflags", "+faststart"],
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    if not path.is_file() or not path.stat().st_size:
        free = shutil.disk_usage(path.parent).free
        number = errno.ENOSPC if free < 1 << 20 else errno.EIO
        raise OSError(number, "ffmpeg wrote nothing", str(path))


def _force_to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def thumbnail(path: Path, longest: int) -> Image.Image:
    """A small picture of a PNG, or of a video's middle frame."""
    image = _middle_frame(path) if path.suffix == ".mp4" else Image.open(path).convert("RGB")
    factor = longest // max(image.size)
    if factor > 1:
        # Small pictures in whole multiples, so that pixels stay sharp.
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return image


def _middle_frame(path: Path) -> Image.Image:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    frames = list(reader)
    return Image.frombytes("RGB", about["size"], frames[len(frames) // 2])
