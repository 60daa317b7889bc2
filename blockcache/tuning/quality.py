"""How far a picture is from its uncached twin.

Everything here works on float pictures in 0..1, channels last, as pipelines give them with
`output_type="np"`: `[H, W, C]` for a picture, `[F, H, W, C]` for a video. Nothing passes through
8 bits or a video codec, which add errors of their own; 8-bit pictures are refused, because their
arithmetic wraps (two of them 200 apart everywhere would score 30.1 dB instead of 2.1 dB).
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from blockcache.errors import BlockCacheError

CAP_DB = 100.0
"""What identical pictures score: their PSNR is infinite, which has no mean and no JSON."""

_REACH = 5
_WINDOW = np.exp(-(np.arange(-_REACH, _REACH + 1) ** 2) / (2 * 1.5**2))
_WINDOW /= _WINDOW.sum()

_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_LEAST_FOR_THREE_SCALES, _LEAST_FOR_FIVE_SCALES = 44, 176

FOREGROUND_CHANGE = 0.1
"""Difference from the background, in any channel, that makes a pixel part of the foreground."""

Pixels: TypeAlias = NDArray[Any] | torch.Tensor
Floats: TypeAlias = NDArray[np.float64]


class QualityError(BlockCacheError):
    """Pictures that cannot be measured against each other."""


@dataclass(frozen=True)
class Scores:
    """One picture or video against its uncached twin; for a video the mean over the frames.

    psnr_db: CAP_DB if identical. ssim: 1 if identical. foreground_db: PSNR of the pixels that are
    not background, None where the picture is all background. gmsd: gradient-magnitude similarity
    deviation, 0 if identical. For videos only, else None: worst_frame_db, the lowest PSNR of any
    frame; motion_db, PSNR of the frame differences; flicker, their mean size over the reference's,
    1 if alike.
    """

    psnr_db: float
    ssim: float
    foreground_db: float | None
    worst_frame_db: float | None = None
    gmsd: float = 0.0
    motion_db: float | None = None
    flicker: float | None = None

    @property
    def is_identical(self) -> bool:
        """Whether no pixel differs enough to be measured."""
        return self.psnr_db >= CAP_DB


def scores(picture: Pixels, reference: Pixels) -> Scores:
    """All figures for a picture `[H, W, C]` or a video `[F, H, W, C]`.

    Raises:
        QualityError: shapes differ, or a picture is not float, not finite or not in 0..1.
    """
    a, b = _pair(picture, reference)
    if a.ndim == 3:
        return Scores(_psnr(a, b), ssim(a, b), foreground_psnr(a, b), gmsd=gmsd(a, b))
    if a.ndim != 4 or not len(a):
        raise QualityError(f"expected [H, W, C] or [F, H, W, C], found shape {list(a.shape)}")
    frames = [_psnr(x, y) for x, y in zip(a, b, strict=True)]
    foreground = [foreground_psnr(x, y) for x, y in zip(a, b, strict=True)]
    seen = [value for value in foreground if value is not None]
    return Scores(
        float(np.mean(frames)),
        float(np.mean([ssim(x, y) for x, y in zip(a, b, strict=True)])),
        float(np.mean(seen)) if seen else None,
        min(frames),
        float(np.mean([gmsd(x, y) for x, y in zip(a, b, strict=True)])),
        motion_psnr(a, b),
        flicker_ratio(a, b),
    )


def psnr(picture: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio in dB over all elements, peak 1, in float64; at most CAP_DB.

    Raises:
        QualityError: shapes differ, or a picture is not float, not finite or not in 0..1.
    """
    return _psnr(*_pair(picture, reference))


def _psnr(a: Floats, b: Floats) -> float:
    error = float(np.mean((a - b) ** 2))
    return CAP_DB if error == 0 else min(CAP_DB, -10 * float(np.log10(error)))


def ssim(picture: Pixels, reference: Pixels) -> float:
    """Structural similarity of two pictures `[H, W, C]`, mean over the channels.

    Wang et al. (2004): Gaussian window of 11 x 11 pixels with sigma 1.5, data range 1, borders
    reflected; the same numbers as torchmetrics. Other windows (scikit-image's default is 7 x 7
    and flat) give others. In float64: the variances are small differences of large numbers.

    Raises:
        QualityError: as for `psnr`, or a picture too small to be reflected.
    """
    a, b = _pair(picture, reference)
    if a.ndim != 3 or min(a.shape[:2]) <= _REACH:
        raise QualityError(
            f"SSIM needs pictures [H, W, C] of at least 6 x 6 pixels, found {list(a.shape)}"
        )
    a, b = (np.pad(x, ((_REACH, _REACH), (_REACH, _REACH), (0, 0)), "reflect") for x in (a, b))
    mean_a, mean_b = _blurred(a), _blurred(b)
    variances = _blurred(a * a) - mean_a**2 + _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    small, smaller = 0.03**2, 0.01**2
    structure = (2 * covariance + small) / (variances + small)
    luminance = (2 * mean_a * mean_b + smaller) / (mean_a**2 + mean_b**2 + smaller)
    return float(np.mean(structure * luminance))


def ssim_of_any(picture: Pixels, reference: Pixels) -> float:
    """`ssim` of a picture `[H, W, C]`, or the mean over the frames of a video `[F, H, W, C]`.

    Raises:
        QualityError: as for `ssim`.
    """
    a, b = _pair(picture, reference)
    if a.ndim == 4:
        return float(np.mean([ssim(x, y) for x, y in zip(a, b, strict=True)]))
    return ssim(a, b)


def _blurred(image: Floats) -> Floats:
    """The window's weighted mean around every pixel with a whole window; one axis at a time."""
    for axis in (0, 1):
        length = image.shape[axis] - len(_WINDOW) + 1
        parts = (
            weight * image[(slice(None),) * axis + (slice(k, k + length),)]
            for k, weight in enumerate(_WINDOW)
        )
        image = functools.reduce(operator.add, parts)
    return image


def ms_ssim(picture: Pixels, reference: Pixels) -> float:
    """Multi-scale SSIM of two pictures `[H, W, C]` (Wang et al., 2003), in float64.

    By torchmetrics: its window is that of `ssim` above, and its five weights are the paper's.
    Pictures under 176 pixels have no room for five scales; they get the three finest with their
    weights scaled to 1, and such figures compare only with each other.

    Raises:
        QualityError: as for `psnr`, or a picture under 44 pixels.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    a, b = _pair(picture, reference)
    smallest = min(a.shape[:2])
    if a.ndim != 3 or smallest < _LEAST_FOR_THREE_SCALES:
        raise QualityError(
            f"MS-SSIM needs pictures [H, W, C] of at least {_LEAST_FOR_THREE_SCALES} pixels, "
            f"found {list(a.shape)}"
        )
    fine = _SCALE_WEIGHTS[:3]
    is_large = smallest >= _LEAST_FOR_FIVE_SCALES
    first, second = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (a, b))
    found = multiscale_structural_similarity_index_measure(
        first,
        second,
        data_range=1.0,
        betas=_SCALE_WEIGHTS if is_large else tuple(w / sum(fine) for w in fine),
        normalize="relu",
    )
    return float(found)


def gmsd(picture: Pixels, reference: Pixels) -> float:
    """Gradient magnitude similarity deviation of two pictures `[H, W, C]`, 0 if identical.

    Xue et al. (1308.3052): Prewitt gradients of the luminance at half size; the spread of their
    similarity over the picture. It sees lost and moved edges, and hardly a change of brightness.
    The paper's constant 170 is for 0..255.

    Raises:
        QualityError: as for `psnr`, or a picture too small to be halved.
    """
    a, b = _pair(picture, reference)
    if a.ndim != 3 or min(a.shape[:2]) < 6:
        raise QualityError(f"GMSD needs pictures [H, W, C] of at least 6 pixels, {list(a.shape)}")
    constant = 170 / 255**2
    first, second = _edges(a), _edges(b)
    similarity = (2 * first * second + constant) / (first**2 + second**2 + constant)
    return float(similarity.std())


def _edges(image: Floats) -> Floats:
    """Prewitt gradient magnitudes of the luminance at half size."""
    gray = image.mean(-1) if image.shape[-1] != 3 else image @ np.array([0.299, 0.587, 0.114])
    height, width = (n // 2 * 2 for n in gray.shape)
    half = gray[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    across = (half[:, 2:] - half[:, :-2]) / 3
    down = (half[2:] - half[:-2]) / 3
    across = across[:-2] + across[1:-1] + across[2:]
    down = down[:, :-2] + down[:, 1:-1] + down[:, 2:]
    return np.asarray(np.hypot(across, down))


def motion_psnr(video: Pixels, reference: Pixels) -> float | None:
    """PSNR of the differences between neighbouring frames, `[F, H, W, C]`; peak 1.

    A still error that stays in place costs nothing here; one that comes and goes does. None for a
    single frame.
    """
    a, b = _pair(video, reference)
    return _psnr(np.diff(a, axis=0), np.diff(b, axis=0)) if len(a) > 1 else None


def flicker_ratio(video: Pixels, reference: Pixels) -> float | None:
    """Mean size of the frame differences over the reference's: above 1 is more flicker, below less.

    None for a single frame and for a reference that stands still.
    """
    a, b = _pair(video, reference)
    still = float(np.abs(np.diff(b, axis=0)).mean()) if len(b) > 1 else 0.0
    return float(np.abs(np.diff(a, axis=0)).mean()) / still if still > 0 else None


def determinism_floor(pictures: Sequence[Pixels]) -> float:
    """The lowest PSNR between renders of one thing: what no cache can be told from.

    Raises:
        QualityError: fewer than two pictures.
    """
    if len(pictures) < 2:
        raise QualityError(f"two renders are needed to compare them, found {len(pictures)}")
    return min(psnr(a, b) for a, b in itertools.combinations(pictures, 2))


def foreground_psnr(picture: Pixels, reference: Pixels) -> float | None:
    """PSNR over the pixels of `[H, W, C]` pictures where the reference is not background.

    A large calm background flatters PSNR; this is what happened to the things in front of it.
    None if the reference has no foreground.
    """
    a, b = _pair(picture, reference)
    mask = foreground(b)
    return _psnr(a[mask], b[mask]) if mask.any() else None


def foreground(reference: Pixels) -> NDArray[np.bool_]:
    """Where a picture `[H, W, C]` differs from its background; `[H, W]`.

    The background is the plane (per channel, so that a gradient is one too) that fits the border
    pixels, fitted again to the better half of them so that things touching the border do not
    count.
    """
    image = _checked(reference)
    height, width, channels = image.shape
    y, x = np.mgrid[:height, :width]
    plane = np.stack([np.ones_like(x), x, y], -1).astype(np.float64)
    thickness = max(1, min(height, width) // 32)
    border = np.ones((height, width), bool)
    border[thickness : height - thickness, thickness : width - thickness] = False
    known, wanted = plane[border], image[border]
    kept = np.ones(len(known), bool)
    for _ in range(4):
        coefficients = np.linalg.lstsq(known[kept], wanted[kept], rcond=None)[0]
        residual = np.abs(known @ coefficients - wanted).max(-1)
        kept = residual <= np.median(residual)
    background = (plane.reshape(-1, 3) @ coefficients).reshape(height, width, channels)
    differs: NDArray[np.bool_] = np.abs(image - background).max(-1) > FOREGROUND_CHANGE
    return differs


def lpips_measure() -> Callable[[Pixels, Pixels], float]:
    """LPIPS (1801.03924, AlexNet), 0 if identical; videos by the mean over their frames.

    Raises:
        QualityError: the package `lpips` or the weights of its network are not on disk. Nothing is
            ever downloaded.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if not weights.is_file():
        raise QualityError(f"LPIPS needs AlexNet's weights on disk, found none at {weights}")
    try:
        from lpips import LPIPS
    except ImportError:
        raise QualityError("LPIPS needs the package lpips: pip install lpips") from None
    network = LPIPS(net="alex", verbose=False).eval()

    def measure(picture: Pixels, reference: Pixels) -> float:
        a, b = _pair(picture, reference)
        frames = [torch.from_numpy(x).float().reshape(-1, *x.shape[-3:]) for x in (a, b)]
        with torch.no_grad():
            distance = network(*(2 * x.permute(0, 3, 1, 2) - 1 for x in frames))
        return float(distance.mean())

    return measure


def relative_l2(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """|latents - reference| / |reference| in the 2-norm, in float64. No unit, 0 if equal.

    Raises:
        QualityError: shapes differ, integers, or a reference of zeros.
    """
    if latents.shape != reference.shape:
        raise QualityError(
            f"latents differ in shape: {list(latents.shape)} and {list(reference.shape)}"
        )
    if not (latents.is_floating_point() and reference.is_floating_point()):
        raise QualityError(f"latents must be float, found {latents.dtype}, {reference.dtype}")
    wanted = reference.detach().double()
    size = float(wanted.norm())
    if size == 0:
        raise QualityError("the reference latents are all zero; no relative error exists")
    return float((latents.detach().to(wanted) - wanted).norm()) / size


def from_8bit(picture: Pixels) -> Floats:
    """An 8-bit picture as float in 0..1; for files, whose rounding costs up to 59 dB."""
    array = _array(picture)
    if array.dtype != np.uint8:
        raise QualityError(f"expected an 8-bit picture, found {array.dtype}")
    return array.astype(np.float64) / 255


def _pair(picture: Pixels, reference: Pixels) -> tuple[Floats, Floats]:
    a, b = _checked(picture), _checked(reference)
    if a.shape != b.shape:
        raise QualityError(
            f"pictures differ in shape: {list(a.shape)} and {list(b.shape)}; "
            "both runs need the same height, width and number of frames"
        )
    return a, b


def _array(picture: Pixels) -> NDArray[Any]:
    if isinstance(picture, torch.Tensor):
        tensor = picture.detach().cpu()
        # NumPy has no bfloat16.
        return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)
    return np.asarray(picture)


def _checked(picture: Pixels) -> Floats:
    array = picture if isinstance(picture, np.ndarray) else _array(picture)
    if not np.issubdtype(array.dtype, np.floating):
        raise QualityError(
            f"pictures must be float in 0..1, found {array.dtype}: ask the pipeline for "
            'output_type="np", or convert an 8-bit file with from_8bit()'
        )
    values = array.astype(np.float64, copy=False)
    if not array.size:
        raise QualityError(f"an empty picture, shape {list(array.shape)}")
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise QualityError("the picture holds values that are not numbers (NaN or infinity)")
    if low < -1e-3 or high > 1 + 1e-3:
        raise QualityError(f"pictures must lie in 0..1, found {low:.3g} to {high:.3g}")
    return values
