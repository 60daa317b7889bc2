import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from blockcache.errors import BlockCacheError
from blockcache.tuning import quality
from blockcache.tuning.quality import CAP_DB, QualityError, from_8bit, psnr, scores, ssim


def picture(seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).random((size, size, 3)).astype(np.float32)


def on_background(value: float = 0.2, size: int = 64) -> np.ndarray:
    """A vertical gradient with a bright square of a sixteenth of the area."""
    image = np.repeat(np.linspace(value, value + 0.1, size)[:, None], size, 1)[..., None]
    image = np.repeat(image, 3, -1)
    image[24:40, 24:40] = 0.9
    return image


def test_psnr_is_ten_log_of_the_mean_squared_error():
    reference = np.full((8, 8, 3), 0.5)
    assert psnr(reference + 0.1, reference) == pytest.approx(20)
    half = reference.copy()
    half[:4] += 0.1
    assert psnr(half, reference) == pytest.approx(20 + 10 * math.log10(2))


def test_8bit_pictures_do_not_wrap():
    """uint8 arithmetic gives 200 * 200 = 64 modulo 256, and with it 30.1 dB instead of 2.1 dB."""
    dark, light = np.full((8, 8, 3), 20, np.uint8), np.full((8, 8, 3), 220, np.uint8)
    wrapped = 10 * math.log10(255**2 / float(np.mean((light - dark) ** 2)))
    assert wrapped == pytest.approx(30.1, abs=0.05)
    assert psnr(from_8bit(light), from_8bit(dark)) == pytest.approx(2.11, abs=0.005)
    for pair in ((light, dark), (torch.from_numpy(light), torch.from_numpy(dark))):
        with pytest.raises(QualityError, match="uint8.*output_type.*from_8bit"):
            psnr(*pair)


def test_identical_pictures_score_the_cap_and_are_counted():
    found = scores(picture(), picture())
    assert (found.psnr_db, found.ssim, found.is_identical) == (CAP_DB, pytest.approx(1), True)
    # A difference too small to be measured above the cap is not above it either.
    assert psnr(picture().astype(np.float64) * (1 - 1e-9), picture()) == CAP_DB


def test_float32_pictures_are_measured_in_float64():
    a, b = picture(0, 64), picture(1, 64)
    squares = [(float(x) - float(y)) ** 2 for x, y in zip(a.flat, b.flat, strict=True)]
    expected = -10 * math.log10(math.fsum(squares) / len(squares))
    assert psnr(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.full((8, 8, 3), 255.0), "0..1, found 255"),
        (np.full((8, 8, 3), -1.0), "0..1, found -1"),
        (np.full((8, 8, 3), np.nan), "not numbers"),
        (np.zeros((0, 8, 3)), "empty"),
        (np.zeros((8, 4, 3)), r"shape.*\[8, 4, 3\].*\[8, 8, 3\]"),
    ],
)
def test_what_cannot_be_measured_is_refused(bad, message):
    with pytest.raises(QualityError, match=message):
        psnr(bad, np.zeros((8, 8, 3)))
    assert issubclass(QualityError, BlockCacheError)


@pytest.mark.parametrize("amount", [0.5, 0.01, 1e-4])
@pytest.mark.parametrize("shape", [(32, 32), (6, 40), (37, 23)])
def test_ssim_is_that_of_torchmetrics(amount, shape):
    """Ours is separable: in float64, theirs takes minutes and gigabytes for 1024 x 1024 pixels."""
    random = np.random.default_rng(0)
    a, b = random.random((2, *shape, 3))
    b = np.clip(a + amount * (b - 0.5), 0, 1)
    tensors = [torch.from_numpy(x).movedim(-1, 0)[None] for x in (b, a)]
    expected = structural_similarity_index_measure(
        *tensors, gaussian_kernel=True, sigma=1.5, kernel_size=11, data_range=1.0
    )
    assert ssim(b, a) == pytest.approx(float(expected), abs=1e-9)


def test_ssim_tells_structure_from_light():
    a = picture(0)
    assert ssim(picture(1), a) < 0.1
    assert ssim(a * 0.95, a) > 0.98
    with pytest.raises(QualityError, match="6 x 6"):
        ssim(picture(size=5), picture(size=5))


def test_foreground_is_what_differs_from_the_border():
    mask = quality.foreground(on_background())
    assert mask.sum() == 16 * 16 and mask[24:40, 24:40].all()


def test_things_that_touch_the_border_are_foreground_too():
    image = on_background()
    image[20:44, :10] = (0.9, 0.1, 0.1)
    mask = quality.foreground(image)
    assert mask[20:44, :10].all() and mask.sum() == 16 * 16 + 24 * 10


def test_foreground_psnr_does_not_count_the_background():
    reference = on_background()
    other = reference.copy()
    other[24:40, 24:40] -= 0.1
    found = scores(other, reference)
    assert found.foreground_db == pytest.approx(20)
    assert found.psnr_db == pytest.approx(20 + 10 * math.log10(16))
    plain = np.full((32, 32, 3), 0.4)
    assert scores(plain, plain).foreground_db is None


def test_a_video_is_scored_by_frames():
    reference = np.stack([on_background()] * 3)
    other = reference.copy()
    other[0] += 0.01
    other[1] += 0.05
    found = scores(other, reference)
    assert found.worst_frame_db == pytest.approx(-20 * math.log10(0.05))
    assert found.psnr_db == pytest.approx((40 - 20 * math.log10(0.05) + CAP_DB) / 3)
    assert scores(other[0], reference[0]).worst_frame_db is None


def test_tensors_are_measured_like_arrays():
    a, b = picture(0), picture(1)
    assert psnr(torch.from_numpy(a), torch.from_numpy(b)) == psnr(a, b)
    half = torch.from_numpy(a).bfloat16()
    assert psnr(half, half.float()) == CAP_DB


def test_relative_l2():
    reference = torch.tensor([3.0, 4.0])
    assert quality.relative_l2(reference + torch.tensor([0.0, 0.5]), reference) == 0.1
    assert quality.relative_l2(reference.bfloat16(), reference) == 0
    with pytest.raises(BlockCacheError, match="zero"):
        quality.relative_l2(reference, torch.zeros(2))
    with pytest.raises(BlockCacheError, match="shape"):
        quality.relative_l2(reference, torch.ones(3))
    with pytest.raises(BlockCacheError, match="int64"):
        quality.relative_l2(torch.ones(2, dtype=torch.int64), reference)


# ---- beyond PSNR and SSIM -----------------------------------------------------------------------


def prewitt_by_hand(image):
    """Half-size luminance and its Prewitt magnitudes, pixel by pixel."""
    gray = 0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]
    height, width = gray.shape[0] // 2, gray.shape[1] // 2
    half = [
        [gray[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean() for x in range(width)]
        for y in range(height)
    ]
    edges = []
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            across = sum(half[y + k][x + 1] - half[y + k][x - 1] for k in (-1, 0, 1)) / 3
            down = sum(half[y + 1][x + k] - half[y - 1][x + k] for k in (-1, 0, 1)) / 3
            edges.append(math.hypot(across, down))
    return edges


def test_gmsd_is_the_papers_formula():
    a, b = picture(1, 15).astype(float), picture(2, 15).astype(float)
    c = 170 / 255**2
    pairs = zip(prewitt_by_hand(a), prewitt_by_hand(b), strict=True)
    similar = [(2 * x * y + c) / (x * x + y * y + c) for x, y in pairs]
    assert quality.gmsd(a, b) == pytest.approx(np.std(similar), abs=1e-12)


def test_gmsd_sees_a_moved_edge_and_not_the_brightness():
    plain = on_background()
    brighter, moved = np.clip(plain + 0.02, 0, 1), on_background()
    moved[24:40, 40:44] = 0.9
    assert quality.gmsd(plain, plain) == 0
    assert quality.gmsd(brighter, plain) < 1e-6 < 0.05 < quality.gmsd(moved, plain)
    with pytest.raises(QualityError, match="at least 6 pixels"):
        quality.gmsd(plain[:4], plain[:4])


def luminance_and_structure(a, b):
    """The two factors of SSIM around every pixel with a whole window, by the definition."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    pairs = []
    for y in range(5, a.shape[0] - 5):
        for x in range(5, a.shape[1] - 5):
            p, q = (i[y - 5 : y + 6, x - 5 : x + 6] for i in (a, b))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            luminance = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
            pairs.append((luminance, (2 * cov + 9e-4) / (vp + vq + 9e-4)))
    return np.array(pairs)


def test_ms_ssim_of_a_small_picture_is_the_product_over_three_scales():
    plain = np.full((64, 64, 1), 0.5)
    plain[20:44, 20:44] = picture(3, 24)[..., :1]
    other = plain.copy()
    other[20:44, 20:44] = 0.7 * other[20:44, 20:44] + 0.3 * picture(4, 24)[..., :1]
    weights = np.array([0.0448, 0.2856, 0.3001])
    weights /= weights.sum()
    product, a, b = 1.0, plain[..., 0], other[..., 0]
    for scale, weight in enumerate(weights):
        # The last scale's borders are reflected, as in SSIM; elsewhere only whole windows count.
        whole = [np.pad(x, 5, "reflect") if scale == 2 else x for x in (a, b)]
        luminance, structure = luminance_and_structure(*whole).T
        factor = (luminance * structure).mean() if scale == 2 else structure.mean()
        product *= max(factor, 0) ** weight
        a, b = (x.reshape(x.shape[0] // 2, 2, -1, 2).mean((1, 3)) for x in (a, b))
    assert quality.ms_ssim(other, plain) == pytest.approx(product, abs=1e-9)
    assert quality.ms_ssim(plain, plain) == pytest.approx(1.0)


def test_ms_ssim_of_a_large_picture_is_torchmetrics_own():
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    a, b = picture(1, 180).astype(np.float64), picture(2, 180).astype(np.float64)
    near = 0.8 * a + 0.2 * b
    tensors = [torch.from_numpy(x).permute(2, 0, 1)[None] for x in (near, a)]
    expected = multiscale_structural_similarity_index_measure(*tensors, data_range=1.0)
    assert quality.ms_ssim(near, a) == pytest.approx(float(expected), abs=1e-9)
    with pytest.raises(QualityError, match="at least 44 pixels"):
        quality.ms_ssim(a[:40], a[:40])


def test_motion_and_flicker_of_videos():
    still = np.full((4, 12, 12, 3), 0.5)
    moving = still + np.array([0, 0.1, 0, 0.1])[:, None, None, None]
    shifted = moving + 0.2
    assert quality.motion_psnr(shifted, moving) == CAP_DB
    assert quality.flicker_ratio(shifted, moving) == pytest.approx(1.0)
    # Every frame difference is off by 0.1.
    assert quality.motion_psnr(still, moving) == pytest.approx(20.0)
    assert quality.flicker_ratio(still, moving) == 0
    assert quality.flicker_ratio(moving, still) is None
    assert quality.motion_psnr(still[:1], moving[:1]) is None
    found = scores(still, moving)
    assert found.motion_db == pytest.approx(20.0) and found.flicker == 0
    assert scores(still[0], moving[0]).motion_db is None


def test_the_determinism_floor_is_the_worst_pair():
    plain = np.full((8, 8, 3), 0.5)
    assert quality.determinism_floor([plain, plain]) == CAP_DB
    assert quality.determinism_floor([plain, plain + 0.01, plain + 0.1]) == pytest.approx(20.0)
    with pytest.raises(QualityError, match="two renders"):
        quality.determinism_floor([plain])


def test_lpips_is_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(QualityError, match="weights on disk, found none"):
        quality.lpips_measure()
