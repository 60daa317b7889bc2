"""The benchmark of sparse methods on the embedded video model, without rendering anything."""

import json

import click
import pytest

from benchmarks import sparse_video
from benchmarks.sparse_video import Way
from blockcache.sparse import names

WAYS = [Way("sparse", "cubes", f"density={n}") for n in range(6)]
KNOWN = next(way for way in sparse_video.all_ways() if way.method == "cubes")
ITEMS = [("a", 0), ("b", 1)]


def figures(speed=2.0, db=30.0, **more):
    found = {"dense_s": 10.0, "seconds": 10.0 / speed, "dense_cpu_s": 9.0, "cpu_s": 9.0 / speed}
    quality = {"psnr_db": db, "worst_frame_db": db - 3, "motion_db": db + 5, "flicker": 1.0}
    return found | quality | {"density": 0.2, "recall": None} | more


def entry(*items, way=WAYS[0]):
    named = {"kind": way.kind, "method": way.method, "setting": way.setting}
    return named | {"items": {str(i): item for i, item in enumerate(items)}}


def test_every_planner_is_swept_and_every_way_has_a_name_of_its_own():
    ways = sparse_video.all_ways()
    more = {"patches", "sta, partly dense", "adaspa, partly dense"}
    assert {way.method for way in ways if way.kind == "sparse"} == {*names(), *more}
    assert len({way.key for way in ways}) == len(ways)
    kinds = ("sparse", "caching", "both", "fewer steps")
    assert tuple(dict.fromkeys(way.kind for way in ways)) == kinds
    for way in ways:
        has_rules = way.recipe is not None and bool(way.recipe.rules)
        assert has_rules == (way.kind in ("caching", "both"))
        is_sparse = way.recipe is not None and way.recipe.sparse is not None
        assert is_sparse == (way.kind in ("sparse", "both"))


def test_all_of_one_prompt_comes_before_the_next_and_what_is_known_is_left_out(monkeypatch):
    monkeypatch.setattr(sparse_video, "PER_TURN", 4)
    known = {WAYS[1].key: entry(figures(), way=WAYS[1])}
    told = [(n, [way.setting[-1] for way in some]) for n, some in
            sparse_video.turns(WAYS, ITEMS, known)]  # fmt: skip
    assert told == [(0, list("0234")), (0, ["5"]), (1, list("0123")), (1, list("45"))]


def test_points_by_hand():
    found = sparse_video.point(entry(figures(2.0, 30.0), figures(1.5, 34.0), figures(3.0, 20.0)))
    assert found["speedup"] == 2.0 and found["cpu_speedup"] == 2.0 and found["prompts"] == 3
    assert found["psnr_db"] == {"median": 30.0, "worst": 20.0}
    assert found["worst_frame_db"] == 17.0 and found["density"] == 0.2 and found["recall"] is None


def test_the_table_marks_what_nothing_beats():
    rows = [
        sparse_video.point(entry(figures(speed, db), way=way))
        for way, (speed, db) in zip(WAYS, ((2.0, 30.0), (1.5, 29.0), (1.2, 35.0)), strict=False)
    ]
    lines = sparse_video.table(rows).splitlines()[2:]
    assert ["**" in line for line in lines] == [True, False, True]
    assert "| 2.00x | 2.00x | **30.0** / 30.0 | 27.0 | 35.0 | 1.00 | 0.20 |  |" in lines[0]


COMMON = {"model": "m", "weights": "0", "call": {"num_inference_steps": 28}, "dense_steps": 0.1}


def test_figures_are_found_again_and_only_with_the_same_setup(tmp_path):
    file = tmp_path / "deep" / "found.json"
    ways = {KNOWN.key: entry(figures(), way=KNOWN)}
    assert sparse_video.load(file, COMMON) == {}
    points = sparse_video.save(file, COMMON, ways | {"given up": entry(figures())})
    assert [p["method"] for p in points] == ["cubes", "cubes"]
    assert sparse_video.load(file, COMMON) == ways
    assert "28 steps of which the first 10%" in json.loads(file.read_text())["markdown"]
    with pytest.raises(click.ClickException, match="figures of another weights"):
        sparse_video.load(file, COMMON | {"weights": "1"})
    assert [path.name for path in file.parent.iterdir()] == ["found.json"]


def test_the_plot_has_a_line_for_every_method(tmp_path):
    rows = [
        sparse_video.point(entry(figures(speed), way=Way(kind, kind, "x")))
        for speed, kind in ((1.2, "sparse"), (1.5, "caching"), (2.0, "both"), (1.9, "fewer steps"))
    ]
    sparse_video.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
