"""The race's figures on points worked out by hand."""

import math

import pytest

from benchmarks.peers import figures
from benchmarks.peers.figures import Point, db_at, dominated, front, picked, speed_at, unmatched
from benchmarks.peers.ground import FEWER, OURS, PEERS


def row(side, family, setting, speedup, median, worst):
    return {
        "side": side,
        "family": family,
        "setting": setting,
        "speedup": speedup,
        "psnr_db": {"median": median, "worst": worst},
    }


LINE = [Point(1.5, 50, "slow"), Point(2, 44, "middle"), Point(4, 32, "fast")]


def test_a_front_leaves_out_what_another_point_is_as_fast_and_as_good_as():
    others = [Point(1.4, 50, "as good, slower"), Point(2, 43, "as fast, worse"), Point(3, 30, "no")]
    assert front([*others, *reversed(LINE)]) == LINE
    assert front([]) == []


def test_of_two_equal_points_one_stays():
    assert front([Point(2, 40, "a"), Point(2, 40, "b")]) == [Point(2, 40, "a")]


def test_speed_between_two_points_runs_straight_in_its_logarithm():
    # 38 dB lies half-way between 44 dB at 2x and 32 dB at 4x.
    assert speed_at(LINE, 38)[0] == pytest.approx(math.sqrt(2 * 4))
    # A quarter of the way: nearer to the slower one.
    speed, name = speed_at(LINE, 41)
    assert (speed, name) == (pytest.approx(2 * 2**0.25), "middle")
    assert speed_at(LINE, 44) == (pytest.approx(2), "middle")


def test_speed_outside_of_the_front_is_not_extrapolated():
    assert speed_at(LINE, 20) == (4, "fast")
    assert speed_at(LINE, 51) == (1.0, "uncached")
    assert speed_at([], 30) == (1.0, "uncached")


def test_quality_between_two_points_runs_straight_in_the_logarithm_of_speed():
    assert db_at(LINE, math.sqrt(8))[0] == pytest.approx(38)
    assert db_at(LINE, 2) == (44, "middle")
    assert db_at(LINE, 1.2) == (50, "slow")
    assert db_at(LINE, 4.01) is None
    assert db_at([], 1) is None


def test_dominated_points_are_those_with_a_faster_and_better_one():
    ours = [Point(2, 45, "ours"), Point(3, 35, "ours, fast")]
    theirs = [Point(2, 46, "as fast"), Point(3.1, 36, "both")]
    assert dominated(ours, theirs) == [(ours[1], theirs[1])]


def test_unmatched_points_are_what_we_lose():
    ours = [Point(2, 45), Point(3, 35)]
    theirs = [Point(1.9, 44, "matched"), Point(2.5, 40, "between"), Point(1.1, 70, "slow, good")]
    assert [p.name for p in unmatched(ours, theirs)] == ["slow, good", "between"]


def test_the_settings_that_the_figures_need_go_on_to_the_race():
    median = [
        Point(1.2, 60, "a"),
        Point(1.6, 46, "b"),
        Point(2.1, 41, "c"),
        Point(2.0, 40.5, "worse than c"),
        Point(3.2, 31, "d"),
        Point(4.5, 25, "e"),
    ]
    worst = [
        Point(1.2, 50, "a"),
        Point(1.6, 40, "b"),
        Point(2.1, 20, "c"),
        Point(2.0, 35, "worse than c"),
        Point(3.2, 25, "d"),
        Point(4.5, 22, "e"),
    ]
    # 45 dB: b, 40 and 35 dB: c, 30 dB: d; the best worst prompt at 2x, 3x, 4x: the third, d, e.
    assert picked(median, worst, 5) == [1, 2, 3, 4, 5]
    assert picked(median, worst, 3) == [1, 2, 4]
    assert picked(median, worst, 99) == [0, 1, 2, 3, 4, 5]
    assert picked([], [], 3) == []


@pytest.fixture
def rows():
    return [
        row(PEERS, "cache", "slow", 1.5, 50, 40),
        row(PEERS, "cache", "fast", 3, 30, 20),
        row(PEERS, "cache", "reuses nothing", 1.02, 100, 100),
        {"side": PEERS, "family": "other", "setting": "x", "objection": "needs guidance"},
        row(FEWER, "same sampler", "25 steps", 2, 40, 25),
        row(FEWER, "same sampler", "12 steps", 4, 35, 15),
        row(OURS, "tuned", "psnr-40", 3, 40, 30),
        row(OURS, "preset", "fast", 6, 30, 22),
    ]


def test_figures_at_equal_quality(rows):
    found = {at["db"]: at for at in figures.figures(rows)["at_db"]}
    assert found[40][OURS] == {"speedup": pytest.approx(3), "name": "tuned: psnr-40"}
    assert found[40][PEERS]["speedup"] == pytest.approx(math.sqrt(1.5 * 3))
    assert found[40][FEWER]["speedup"] == pytest.approx(2)
    # None of ours is that good: then it is the uncached run.
    assert found[45][OURS] == {"speedup": 1.0, "name": "uncached"}
    assert found[30][OURS]["speedup"] == pytest.approx(6)


def test_a_tuned_plan_is_held_against_the_best_peer_at_its_own_median(rows):
    (found,) = figures.figures(rows)["tuned"]
    assert found["plan"] == "psnr-40"
    assert found["wall_ratio"] == pytest.approx(math.sqrt(1.5 * 3) / 3)


def test_figures_at_equal_wall_time(rows):
    found = {at["speedup"]: at for at in figures.figures(rows)["at_speed"]}
    assert found[2][OURS]["worst"]["db"] == 30
    assert found[2][FEWER]["worst"]["db"] == 25
    assert found[3][PEERS]["worst"]["db"] == pytest.approx(20)
    assert found[4][PEERS] == {"median": None, "worst": None}


def test_aims_are_judged_and_losses_named(rows):
    found = figures.figures(rows)
    met = {aim["aim"]: aim["met"] for aim in found["aims"]}
    assert not met["wall time over the best peer's, 45 dB median, at most"]
    assert met["wall time over the best peer's, 30 dB median, at most"]
    # 30 dB against 20 dB; at 4x no peer is that fast.
    assert met["dB over the best peer's worst prompt at 3x, at least"]
    assert met["dB over the best peer's worst prompt at 4x, at least"]
    # 35.8 dB (between 40 and 30) against 35 dB is not 3 dB more.
    assert not met["dB over the best of fewer steps at 4x, median, at least"]
    assert met["dB over the best of fewer steps at 2x, worst, at least"]
    assert met["speed-up at 30 dB median, at least"]
    assert found["fastest_at_30_db"] == {PEERS: 3, FEWER: 4, OURS: 6}
    assert found["dominated_by_peers"] == {"median": [], "worst": []}
    lost = [point["name"] for point in found["not_matched"][PEERS]["median"]]
    assert lost == ["cache: slow"]


def test_nobody_of_ours_being_fast_enough_is_no_win():
    found = figures.figures(
        [row(PEERS, "cache", "x", 5, 30, 20), row(OURS, "preset", "y", 2, 50, 45)]
    )
    met = {aim["aim"]: aim["met"] for aim in found["aims"]}
    assert met["dB over the best peer's worst prompt at 2x, at least"]
    assert not met["dB over the best peer's worst prompt at 3x, at least"]
    assert not met["dB over the best of fewer steps at 3x, worst, at least"]
