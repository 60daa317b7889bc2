"""What a comparison of videos writes beside the pictures."""

import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageColor

from blockcache.pipelines import compare as writer
from blockcache.pipelines import films, sheets
from comparison_toys import branch, comparison

CLIP = (6, 32, 48, 3)


def sparse_summary():
    """Three blocks over four steps: dense at first, then sparse, the last step reused."""
    rows = [[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]]
    attention = {
        "planner": "Cubes",
        "density": 0.25,
        "map": [[None] * 3, [None, 0.2, 0.4], [None, 0.2, 0.2]],
        "layers": [{"layer": 1, "calls": 4, "density": 0.2, "recall": 0.9},
                   {"layer": 2, "calls": 4, "density": 0.3, "recall": None}],
    }  # fmt: skip
    one = {"part": "transformer", "branches": [branch("0", rows), branch("1", rows)]}
    return {"models": [one | {"cache_bytes": 0, "attention": attention}]}


def test_figures_of_every_frame_by_hand():
    c = comparison(shape=CLIP)
    first, second = json.loads(json.dumps(c.as_dict()))["items"]
    # Item i is off by 0.01 * (i + 1) everywhere and always.
    assert first["frames_psnr_db"] == pytest.approx([40.0] * 6, abs=1e-3)
    assert second["frames_psnr_db"] == pytest.approx([-20 * np.log10(0.02)] * 6, abs=1e-3)
    assert first["motion_psnr_db"] > 90 and first["flicker"] == pytest.approx(1.0, abs=1e-3)
    assert "frames_psnr_db" not in comparison().as_dict()["items"][0]


def test_a_film_has_a_picture_for_every_frame(tmp_path):
    """Read back with ffmpeg: the left tile of each frame is the uncached video, enlarged."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    c = comparison(shape=CLIP, prompts=3)
    files = writer.write(c, tmp_path)
    film = tmp_path / "side-by-side.mp4"
    assert film in files and not (tmp_path / "side-by-side.gif").exists()
    reader = imageio_ffmpeg.read_frames(str(film))
    about = next(reader)
    width, height = about["size"]
    frames = [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
    # The median and the worst prompt, of three tiles of 8 times 48 x 32 pixels each.
    assert len(frames) == 6 and (width, height) == (3 * 384 + 16, 2 * 256 + 8)
    for frame, row in ((frames[4], c.accelerated.typical), (frames[4], c.accelerated.worst)):
        top = 0 if row == c.accelerated.typical else 256 + 8
        expected = sheets.as_8bit(c.baseline.pictures[row][4]).repeat(8, 0).repeat(8, 1)
        # Below the label; the codec keeps less of colours than of brightness.
        found = frame[top + 64 : top + 256, :384].astype(float).mean(-1)
        assert np.abs(found - expected[64:].astype(float).mean(-1)).mean() < 4


def test_without_ffmpeg_the_film_is_a_gif(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    files = writer.write(comparison(shape=CLIP, prompts=1), tmp_path)
    assert tmp_path / "side-by-side.gif" in files
    assert not (tmp_path / "side-by-side.mp4").exists()
    with Image.open(tmp_path / "side-by-side.gif") as film:
        assert film.n_frames == 6 and film.size == (3 * 384 + 16, 256)
        assert film.info["duration"] == 60


def test_pictures_have_no_film(tmp_path):
    names = {path.name for path in writer.write(comparison(), tmp_path)}
    assert not any(
        name.startswith(("side-by-side.m", "side-by-side.g", "frames")) for name in names
    )
    one_frame = comparison(shape=(1, 16, 24, 3))
    assert not films.is_video(one_frame) and films.is_video(comparison(shape=CLIP))


def test_the_strip_shows_frames_of_the_worst_prompt():
    c = comparison(shape=(23, 24, 24, 3))
    page = np.asarray(films.strip(c))
    worst = c.accelerated.worst
    for column, frame in enumerate((0, 3, 6, 9, 13, 16, 19, 22)):
        tile = sheets.as_8bit(c.baseline.pictures[worst][frame]).repeat(6, 0).repeat(6, 1)
        x = 150 + column * (144 + 8)
        assert np.array_equal(page[78 : 78 + 144, x : x + 144], tile)


def test_the_map_of_densities():
    c = comparison(prompts=1, summaries=(sparse_summary(),))
    image = sheets.density(c)
    # 4 steps and 3 blocks: cells of 22 pixels, below and right of the axes.
    left, top = 28 + 64, 28 + 110
    seen = [
        [image.getpixel((left + step * 22 + 8, top + block * 22 + 8)) for block in range(3)]
        for step in range(4)
    ]
    dense, reused = ImageColor.getrgb(sheets.COMPUTED), ImageColor.getrgb(sheets.REUSED)
    fifth, two_fifths = sheets.color_of(0.2), sheets.color_of(0.4)
    assert seen == [
        [dense] * 3, [dense, fifth, two_fifths], [dense, fifth, fifth], [reused] * 3
    ]  # fmt: skip
    assert fifth != two_fifths and sheets.color_of(0.0) == sheets.REUSED


def test_the_map_of_densities_is_written_where_there_is_one(tmp_path):
    writer.write(comparison(prompts=1, summaries=(sparse_summary(),)), tmp_path / "sparse")
    writer.write(comparison(prompts=1), tmp_path / "dense")
    assert (tmp_path / "sparse" / "density.png").exists()
    assert not (tmp_path / "dense" / "density.png").exists()
