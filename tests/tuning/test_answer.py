import pytest

from blockcache.tuning.answer import Raced, asked_and_found, words_for, words_on_rivals
from blockcache.tuning.goal import Goal

PSNR = Goal("psnr_db", 30.0, lambda a, b: 0.0)
LPIPS = Goal("lpips", 0.1, lambda a, b: 0.0, sign=-1.0)
COST = {"passes": 12.0, "minutes": 3.0}


def test_figures_are_in_their_own_sense():
    assert asked_and_found(PSNR, [40.0, 28.0, 35.0]) == {
        "target": 30.0,
        "share": 0.5,
        "psnr_db_median": 35.0,
        "psnr_db_mean": pytest.approx(34.333333),
        "psnr_db_worst": 28.0,
        "checked": 3.0,
        "margin": 5.0,
    }
    found = asked_and_found(LPIPS, [-0.05, -0.2, -0.08])
    assert found["lpips_worst"] == 0.2 and found["lpips_median"] == 0.08
    assert found["margin"] == pytest.approx(0.02)


def test_a_speed_has_no_margin():
    goal = Goal("psnr_db", float("-inf"), lambda a, b: 0.0, speedup=3.0)
    assert asked_and_found(goal, [40.0]) == {
        "target_speedup": 3.0,
        "psnr_db_median": 40.0,
        "psnr_db_mean": 40.0,
        "psnr_db_worst": 40.0,
        "checked": 1.0,
    }


def test_the_note_says_first_whether_the_goal_is_met():
    reached = asked_and_found(PSNR, [40.0, 28.0, 35.0]) | COST
    assert words_for(PSNR, reached, "9 of 50 steps computed", "") == [
        "tuned for psnr_db at least 30 dB in 50% of the pictures",
        "psnr_db on 3 other pictures: median 35, worst 28",
        "9 of 50 steps computed",
        "found in 12.0 uncached passes, 3.0 min",
    ]
    unchecked = words_for(PSNR, asked_and_found(PSNR, []) | COST, "how", "interrupted")
    assert unchecked[0].endswith("NOT MET, this is the closest (interrupted)")
    assert len(unchecked) == 3


def test_a_rival_wins_by_time_median_and_worst():
    ours = Raced("this plan", 0, (30.0, 40.0, 35.0), 1.0)
    better = Raced("fewer steps", 12, (31.0, 41.0, 36.0), 1.01)
    slow = Raced("slow", 20, (50.0, 50.0, 50.0), 1.2)
    tipped = Raced("tipped", 12, (12.0, 60.0, 60.0), 0.5)
    none = ["no rival (fewer steps, other solvers) came as near in the same time"]
    assert words_on_rivals(PSNR, ours, [slow, tipped], 1.02) == none
    assert words_on_rivals(PSNR, ours, [slow, better], 1.02) == [
        "rival fewer steps (12 steps) is as fast and nearer: 36 against 35; no cache needed here"
    ]
