import dataclasses
import io
import json
import os

import numpy as np
import pytest
from PIL import Image, ImageColor

from blockcache.errors import BlockCacheError
from blockcache.pipelines import compare as writer
from blockcache.pipelines import sheets
from comparison_toys import MAP, branch, comparison, entry, summary


def test_figures_of_a_comparison_by_hand():
    c = comparison(prompts=3)
    d = c.as_dict()
    assert d["speedup"] == 2.5 and d["computed_fraction"] == 0.75 and d["cache_bytes"] == 3 << 20
    assert d["psnr_db"]["median"] == pytest.approx(-20 * np.log10(0.02), abs=1e-3)
    assert d["psnr_db"]["worst"] == pytest.approx(-20 * np.log10(0.03), abs=1e-3)
    assert d["worst"] == {"prompt": "prompt 2", "seed": 2}
    assert (c.accelerated.typical, c.accelerated.worst) == (1, 2)
    assert 'worst: "prompt 2", seed 2: 30.5 dB' in str(c) and "2.50x" in str(c)


def test_a_rival_that_does_better_is_named():
    c = comparison()
    before, after = c.baseline.pictures, c.accelerated.pictures
    nearer = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
    rivals = (
        entry("fast and near", nearer, before, 0.3),
        entry("near but slow", nearer, before, 0.5),
        entry("fast but far in the worst prompt", [before[0], after[1] + 0.01], before, 0.3),
    )
    told = dataclasses.replace(c, rivals=rivals)
    assert told.as_dict()["better_rivals"] == ["fast and near"]
    assert str(told).count("no cache needed here") == 1
    assert c.as_dict()["better_rivals"] == []


def test_a_picture_is_saved_rounded_and_knows_its_prompt(tmp_path):
    c = comparison()
    writer.write(c, tmp_path)
    with Image.open(tmp_path / "001-half.png") as image:
        assert (image.text["prompt"], image.text["blockcache"]) == ("prompt 1", "half")
        expected = np.rint(c.accelerated.pictures[1] * 255)
        assert np.array_equal(np.asarray(image), expected)


def test_a_video_is_saved_frame_by_frame_without_loss(tmp_path):
    c = comparison(shape=(5, 16, 24, 3), prompts=1)
    writer.write(c, tmp_path)
    with Image.open(tmp_path / "000-uncached.png") as image:
        assert image.n_frames == 5 and image.size == (24, 16)
        for i, frame in enumerate(c.baseline.pictures[0]):
            image.seek(i)
            assert np.array_equal(np.asarray(image.convert("RGB")), np.rint(frame * 255))


@pytest.mark.parametrize(
    "shape", [(64, 64, 3), (16, 24, 3), (300, 420, 3), (32, 32, 1), (3, 16, 16, 3)]
)
@pytest.mark.parametrize("prompts", [1, 9])
def test_sheets_of_all_shapes(shape, prompts):
    c = comparison(shape, prompts)
    side = sheets.side_by_side(c)
    assert 600 < side.width < 1400
    assert side.height > (700 if prompts > 1 and shape[-3] == shape[-2] else 300)
    assert sheets.all_pairs(c).width < 1800


def test_pixels_of_small_pictures_stay_sharp():
    """64 px become 384: every pixel a square of 6, none of them blended."""
    c = comparison(shape=(64, 64, 3), prompts=1)
    sheet = np.asarray(sheets.side_by_side(c))
    expected = sheets.as_8bit(c.baseline.pictures[0]).repeat(6, 0).repeat(6, 1)[100:]
    found = [
        y
        for y in range(sheet.shape[0] - len(expected))
        if np.array_equal(sheet[y : y + len(expected), 28 : 28 + 384], expected)
    ]
    assert len(found) == 1


def test_the_strip_shows_the_map():
    c = comparison(prompts=1)
    image = sheets.strip(c)
    colors = {ImageColor.getrgb(sheets.COMPUTED): 1, ImageColor.getrgb(sheets.REUSED): 0}
    # 4 steps and 3 blocks: cells of 22 pixels, below and right of the axes.
    left, top = 28 + 64, 28 + 92
    seen = [
        [colors[image.getpixel((left + step * 22 + 8, top + block * 22 + 8))] for block in range(3)]
        for step in range(4)
    ]
    assert seen == MAP


def test_branches_share_a_panel_if_they_did_the_same():
    other = [[1, 1, 1]] * 4
    panels = sheets.panels_of(summary(branch("0"), branch("1"), branch("2", other)))
    assert [panel.title for panel in panels] == ["branch 0, 1", "branch 2"]
    assert panels[0].map.tolist() == np.array(MAP).T.tolist()


def test_files_appear_complete_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "compare.json").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        writer.write(comparison(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]
    assert (tmp_path / "compare.json").read_text() == "old"


def test_the_figures_are_written_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    files = writer.write(comparison(), tmp_path / "new")
    assert order[-1] == "compare.json" and [path.name for path in files] == order
    assert json.loads((tmp_path / "new" / "compare.json").read_text())["speedup"] == 2.5


def test_names_of_files_are_harmless(tmp_path):
    c = comparison()
    named = dataclasses.replace(c.accelerated, name="../a b/\u00fc: 0.3")
    files = writer.write(dataclasses.replace(c, accelerated=named), tmp_path / "o")
    assert all(path.parent == tmp_path / "o" for path in files)
    assert (tmp_path / "o" / "000-a-b----0.3.png").exists()


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    writer.check_folder(tmp_path / "new" / "er")
    assert not (tmp_path / "new").exists()
    for place in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(BlockCacheError, match="is not a folder"):
            writer.check_folder(place)


def test_pngs_are_small_enough():
    buffer = io.BytesIO()
    sheets.strip(comparison()).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 40_000
