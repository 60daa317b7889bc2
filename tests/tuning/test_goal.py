import itertools
import math

import numpy as np
import pytest

from blockcache.errors import BlockCacheError
from blockcache.tuning.goal import chance, goal_from, least_pictures
from blockcache.tuning.scoring import Distance, score


def holds(asked, figures, confidence):
    return sum(map(asked.reaches, figures)) >= asked.needed(len(figures), confidence)


def goal(share=0.5, **asked):
    given = dict.fromkeys(("psnr", "ssim", "lpips", "speedup", "metric"))
    return goal_from(**{**given, **asked}, share=share)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "give one goal of .* found none"),
        ({"psnr": 30, "ssim": 0.9}, "found psnr, ssim"),
        ({"psnr": math.nan}, r"psnr must lie in 5..90 .* found nan"),
        ({"psnr": 200}, "only identical pictures are beyond"),
        ({"psnr": math.inf}, "found inf"),
        ({"psnr": "32"}, "found '32'"),
        ({"ssim": 1.0}, "1 is identical"),
        ({"speedup": 0.5}, "1 is no gain"),
        ({"speedup": math.nan}, "found nan"),
        ({"metric": (lambda a, b: 0.0, math.nan)}, "must be a number"),
        ({"psnr": 32, "share": 1.0}, "share must lie between 0 and 1"),
    ],
)
def test_goals_that_cannot_be_are_refused(asked, message):
    with pytest.raises(BlockCacheError, match=message):
        goal(**asked)


def test_chance_is_that_of_coins():
    for share in (0.5, 0.8):
        for least in range(5):
            expected = sum(
                share ** sum(way) * (1 - share) ** (4 - sum(way))
                for way in itertools.product((0, 1), repeat=4)
                if sum(way) >= least
            )
            assert chance(least, 4, share) == pytest.approx(expected)


def test_a_promise_needs_more_than_half_of_the_pictures():
    asked = goal(psnr=30)
    eleven, twelve = [31.0] * 11 + [29.0] * 5, [31.0] * 12 + [29.0] * 4
    # P(at least 11 of 16 heads) = 10.5 %, at least 12: 3.8 %.
    assert not holds(asked, eleven, 0.9) and holds(asked, twelve, 0.9)
    assert not holds(asked, [31.0] * 3, 0.9) and holds(asked, [31.0] * 4, 0.9)
    assert holds(asked, [30.0] * 4, 0.9)


def test_the_shortfall_is_that_of_the_picture_that_decides():
    asked = goal(psnr=30)
    assert asked.needed(16, 0.9) == 12 and asked.needed(3, 0.9) == 4
    figures = [40.0] * 11 + [27.0] + [10.0] * 4
    assert asked.shortfall(figures, 12) == 3 and not holds(asked, figures, 0.9)
    assert asked.shortfall([31.0] * 12 + [0.0] * 4, 12) == -1
    assert asked.shortfall([29.0] * 3, 4) == 1


def test_a_check_has_enough_pictures_to_convince():
    for share, confidence in ((0.5, 0.9), (0.8, 0.9), (0.5, 0.99)):
        count, asked = least_pictures(share, confidence), goal(share, psnr=30)
        # Two thirds of the error may be gone; of the rest two thirds are left for this look.
        second = 1 - (1 - confidence) * 2 / 9
        assert holds(asked, [31.0] * count, second)
        assert not holds(asked, [31.0] * (count - 1), second)


def test_the_promise_is_kept_as_often_as_it_says():
    """Models whose true median misses the goal by a hair pass at most 10 % of the checks."""
    asked, chances = goal(psnr=30), np.random.default_rng(0)
    passed = sum(holds(asked, chances.normal(29.99, 3, 16), 0.9) for _ in range(2000))
    assert passed / 2000 < 0.1


@pytest.mark.parametrize(("count", "bars"), [(10, [8, 9, 9, 9, 10]), (16, [12, 12, 13, 14, 14])])
def test_every_look_at_another_plan_takes_a_part_of_the_error(count, bars):
    looks = list(itertools.islice(goal(psnr=30).bars(count, 0.9), 5))
    assert looks == bars
    assert sum(chance(bar, count, 0.5) for bar in looks) <= 0.1


def test_the_error_of_all_looks_together_is_never_above_what_was_allowed():
    for share, confidence, count in itertools.product((0.5, 0.9), (0.9, 0.99), (6, 16, 40)):
        bars = itertools.islice(goal(share, psnr=30).bars(count, confidence), 30)
        assert sum(chance(bar, count, share) for bar in bars) <= 1 - confidence + 1e-9


def test_a_larger_share_asks_for_more():
    strict = goal(share=0.8, psnr=30)
    assert strict.typical([10.0, 20, 30, 40, 50]) == 10 and goal(psnr=30).typical([1.0, 2, 3]) == 2
    assert not holds(strict, [31.0] * 10, 0.9) and holds(strict, [31.0] * 11, 0.9)


def test_figures_that_shrink_are_turned_round(monkeypatch):
    monkeypatch.setattr("blockcache.tuning.quality.lpips_measure", lambda: lambda a, b: 0.2)
    asked = goal(lpips=0.1)
    assert asked.figure(np.zeros(1), np.zeros(1)) == -0.2
    assert asked.reaches(-0.05) and not asked.reaches(-0.2)
    assert asked.words() == "lpips at most 0.1 in 50% of the pictures"


def test_the_objective_is_the_median_and_the_early_error():
    far = [Distance(30.0, 40.0), Distance(50.0, 44.0), Distance(10.0, 42.0)]
    assert score(far) == 0.5 * 30 + 0.5 * 42
    # One prompt that tips is chance; the early error of all of them is not.
    tipped = [Distance(30.0, 40.0), Distance(50.0, 44.0), Distance(-9.0, 42.0)]
    assert score(tipped) == score(far) > score([Distance(d.final, d.early - 1) for d in far])


def test_without_latents_the_worst_quarter_stands_for_the_early_error():
    pictures = [Distance(final, math.nan) for final in (36.0, 36.0, 36.0, 10.0)]
    assert score(pictures) == 0.5 * 36 + 0.5 * 10
