"""Pictures and videos to files: whole or not at all, with what they were made from inside."""

import errno
import json
import os
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from blockcache.errors import BlockCacheError
from blockcache.pipelines.sheets import frames_of
from blockcache.tuning.comparison import Picture

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of x264: no difference to be seen.
_CRF = "10"
# What has a meaning in ffmpeg's metadata files.
_SPECIAL = re.compile(r"[=;#\\\n]")


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


def ending(picture: Picture) -> str:
    """PNG for `[H, W, C]`, mp4 for `[F, H, W, C]`."""
    return ".png" if picture.ndim == 3 else ".mp4"


def save(picture: Picture, path: Path, about: Mapping[str, Any], fps: int) -> None:
    """Write a picture or video, float in 0..1.

    path: with the picture's ending. about: what goes into the file as well, JSON under "blockcache"
    in a PNG and as the comment of an mp4; in a PNG "prompt" and "seed" also stand by themselves.
    """
    partial = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        if picture.ndim == 3:
            _write_png(frames_of(picture)[0], partial, about)
        else:
            _write_mp4(frames_of(picture), partial, about, fps)
        _force_to_disk(partial)
        os.replace(partial, path)
        # The new name, too; some file systems cannot, and a name that is lost is rendered again.
        with suppress(OSError):
            _force_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _write_png(image: Image.Image, path: Path, about: Mapping[str, Any]) -> None:
    info = PngInfo()
    for name in ("prompt", "seed"):
        info.add_itxt(name, str(about.get(name, "")).replace("\0", "\ufffd"))
    info.add_itxt("blockcache", json.dumps(about))
    image.save(path, "PNG", pnginfo=info)


def _write_mp4(frames: list[Image.Image], path: Path, about: Mapping[str, Any], fps: int) -> None:
    """As H.264, which plays everywhere.

    ffmpeg reads `about` from a file, for a long prompt does not fit on a command line. It stands in
    a session of its own, so that a Ctrl-C lets it finish.
    """
    import imageio_ffmpeg

    path, notes = path.absolute(), path.with_suffix(".txt").absolute()
    width, height = frames[0].size
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        *("-y", "-v", "error"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps)),
        *("-i", "pipe:0", "-f", "ffmetadata", "-i", str(notes), "-map_metadata", "1"),
        # Players want even sides.
        *("-vf", "scale=ceil(iw/2)*2:ceil(ih/2)*2"),
        *("-c:v", "libx264", "-crf", _CRF, "-pix_fmt", "yuv420p", "-movflags", "+faststart"),
        str(path),
    ]
    comment = _SPECIAL.sub(r"\\\g<0>", json.dumps(about))
    try:
        notes.write_text(f";FFMETADATA1\ncomment={comment}\n", encoding="utf-8")
        pixels = b"".join(frame.tobytes() for frame in frames)
        done = subprocess.run(
            command,
            input=pixels,
            capture_output=True,
            restore_signals=False,
            start_new_session=True,
        )
    finally:
        notes.unlink(missing_ok=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        for number in _FULL:
            if os.strerror(number) in said:
                raise OSError(number, os.strerror(number), str(path))
        raise RuntimeError(f"ffmpeg ended with {done.returncode}: {said[-300:]}")


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

    count, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        about = next(reader)
        (frame,) = islice(reader, count // 2, count // 2 + 1)
    finally:
        reader.close()
    return Image.frombytes("RGB", about["size"], frame)
