"""Guards and the schedules of rules, by hand."""

import pytest

from blockcache.errors import PlanError
from blockcache.plan import (
    Cooldown,
    Every,
    Force,
    Gate,
    Geometric,
    Layout,
    MaskTable,
    MaxStreak,
    Recipe,
    Rule,
    Site,
    Step,
    Taylor,
    Warmup,
    even_steps,
)


def asked(guard, total=6, streak=0):
    """The steps at which a guard asks for computing."""
    return [i for i in range(total) if guard.must_compute(Step(i, total, 0.0), streak)]


@pytest.mark.parametrize(
    ("guard", "expected"),
    [
        (Warmup(0), []),
        (Warmup(2), [0, 1]),
        (Warmup(99), [0, 1, 2, 3, 4, 5]),
        (Cooldown(0), []),
        (Cooldown(2), [4, 5]),
        (Cooldown(99), [0, 1, 2, 3, 4, 5]),
        (Force((1, 3)), [1, 3]),
        (Force((-1, 0, -6)), [0, 5]),
        (Force((6, -7)), []),
    ],
)
def test_guards_by_step(guard, expected):
    assert asked(guard) == expected


@pytest.mark.parametrize(("streak", "expected"), [(0, []), (2, []), (3, list(range(6)))])
def test_max_streak(streak, expected):
    assert asked(MaxStreak(3), streak=streak) == expected


@pytest.mark.parametrize(
    "make",
    [lambda: Warmup(-1), lambda: Cooldown(-1), lambda: MaxStreak(0), lambda: Warmup(1.5)],
)
def test_impossible_guards_are_refused(make):
    with pytest.raises(PlanError, match="steps"):
        make()


def test_a_schedule_names_who_asked():
    guards = (Warmup(2), Cooldown(1), MaxStreak(2))
    rule = Rule(Site("stack"), MaskTable(((0, 5),), 10), guards=guards)
    # 0 table; 1 warm-up; 2, 3 reused; 4 streak of 2; 5 table; 6, 7 reused; 8 streak; 9 cool-down.
    expected = (
        ("MaskTable", "Warmup", "", "", "MaxStreak", "MaskTable", "", "", "MaxStreak", "Cooldown"),
    )
    assert rule.schedule(even_steps(10), 1) == expected


def test_the_first_guard_that_asks_is_named_and_an_online_policy_has_no_schedule():
    rule = Rule(Site("span", 1), Gate(0.1), guards=(Warmup(1), MaxStreak(1)))
    assert rule.schedule(even_steps(4), 1) is None
    assert [rule.forced(Step(0, 4, 0.0), 3), rule.forced(Step(1, 4, 0.0), 1)] == [
        "Warmup",
        "MaxStreak",
    ]
    assert rule.forced(Step(1, 4, 0.0), 0) == ""


def test_a_recipe_is_written_down_with_its_guards_worked_in():
    static = Rule(Site("stack"), Every(4), Taylor(1), (Cooldown(1),), "output")
    online = Rule(Site("span", 1), Gate(0.2), guards=(Warmup(3),))
    recipe = Recipe((static, online), "leader", "mixed")
    written = recipe.written_down(even_steps(8), Layout((5,)))
    sigmas = tuple(1 - i / 8 for i in range(8))
    table = MaskTable(((0, 4, 7),), 8, sigmas)
    assert written == Recipe(
        (Rule(Site("stack"), table, Taylor(1), (), "output"), online), "leader", "mixed"
    )
    assert not recipe.is_static()
    assert Recipe((static,)).is_static()


def test_writing_down_keeps_one_row_a_block_only_where_they_differ():
    rows = ((0, 2), (0,), (0, 1))
    rule = Rule(Site("block"), MaskTable(rows, 4))
    (kept,) = Recipe((rule,)).written_down(even_steps(4), Layout((3,))).rules
    assert kept.policy.computed == rows
    same = Rule(Site("block"), Geometric(0.5))
    (kept,) = Recipe((same,)).written_down(even_steps(4), Layout((3,))).rules
    assert kept.policy.computed == ((0, 1),)


def test_writing_down_twice_changes_nothing():
    recipe = Recipe((Rule(Site("stack"), Geometric(0.3), guards=(Cooldown(1),)),))
    once = recipe.written_down(even_steps(12), Layout((4,)))
    assert once.written_down(even_steps(12), Layout((4,))) == once


def test_a_recipe_needs_rules_and_known_words():
    rule = Rule(Site("stack"), Every(2))
    with pytest.raises(PlanError, match="at least one rule"):
        Recipe(())
    with pytest.raises(PlanError, match="branches"):
        Recipe((rule,), "all")
    with pytest.raises(PlanError, match="payload"):
        Rule(Site("stack"), Every(2), payload="delta")
    with pytest.raises(PlanError, match="policy"):
        Rule(Site("stack"), "every 2")
    with pytest.raises(PlanError, match="predictor"):
        Rule(Site("stack"), Every(2), "copy")
    with pytest.raises(PlanError, match="guards"):
        Rule(Site("stack"), Every(2), guards=("warm",))
