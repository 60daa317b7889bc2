import pytest

from blockcache.errors import PlanError
from blockcache.pipelines.drawing import computed_blocks, plan_lines
from blockcache.plan import (
    Every,
    Fingerprint,
    Gate,
    Layout,
    MaskTable,
    Plan,
    Recipe,
    Rule,
    Site,
    Taylor,
    even_steps,
    steps_from_sigmas,
)


def plan(*rules, blocks=4, total=6, steps=None, **changes) -> Plan:
    recipe = Recipe(rules, name="drawn")
    mark = Fingerprint("FooTransformer", "0", blocks, "EulerScheduler", "float32")
    made = Plan.make(recipe, mark, steps or even_steps(total), Layout((blocks,)))
    return Plan(made.recipe, mark, total, **changes)


def drawn(plan: Plan, width=80) -> list[str]:
    return [line.plain for line in plan_lines(plan, width)]


def test_like_blocks_are_one_line():
    lines = drawn(plan(Rule(Site(), Every(2), Taylor(1))))
    assert lines[0] == "drawn: 6 steps of FooTransformer (4 blocks, EulerScheduler, float32)"
    assert lines[3:5] == ["            0     ", "blocks 0-3  █·█·█·"]
    assert lines[-1].endswith("50% of the block calls computed")


def test_a_span_has_lines_of_its_own():
    lines = drawn(plan(Rule(Site("span", 1, 3), Every(3))))
    assert [line for line in lines if line.startswith("block")] == [
        "block 0     ██████",
        "blocks 1-2  █··█··",
        "block 3     ██████",
    ]
    assert lines[-1].endswith("67% of the block calls computed")


def test_rules_add_up_and_blocks_have_rows_of_their_own():
    table = MaskTable(((0, 1), (0, 2)), 3)
    rules = (Rule(Site("block", 0, 2), table), Rule(Site("span", 2, 3), Every(3)))
    assert computed_blocks(plan(*rules, blocks=3, total=3)) == [
        (True, True, False),
        (True, False, True),
        (True, False, False),
    ]


def test_branches_of_their_own_are_drawn_one_by_one():
    first = Rule(Site(), MaskTable(((0, 2, 4),), 6), branch=0)
    second = Rule(Site("model"), MaskTable(((0, 4),), 6), payload="output", branch=1)
    lines = drawn(plan(first, second))
    assert lines[1].startswith("  stack of branch 0: residual")
    assert [line for line in lines if "branch" in line or line.startswith("blocks")][-4:] == [
        "\nbranch 0",
        "blocks 0-3  █·█·█·",
        "\nbranch 1",
        "blocks 0-3  █···█·",
    ]


def test_the_tables_own_noise_levels_are_drawn():
    """With even steps instead, this front-loaded sampler's table would be carried over wrongly."""
    steps = steps_from_sigmas([1.0, 0.99, 0.98, 0.97, 0.5, 0.1])
    assert computed_blocks(plan(Rule(Site(), Every(2)), steps=steps, blocks=1)) == [
        (True, False, True, False, True, False)
    ]


def test_long_runs_are_folded_at_the_width():
    lines = drawn(plan(Rule(Site(), Every(2)), total=100), width=62)
    rows = [line for line in lines if line.startswith("blocks")]
    assert [len(row) - 12 for row in rows] == [50, 50]
    assert lines[3].split() == ["0", "10", "20", "30", "40"]
    assert lines[6].split() == ["50", "60", "70", "80", "90"]


def test_what_was_reached_and_noted_is_shown():
    lines = drawn(
        plan(Rule(Site(), Every(2)), reached={"psnr_db_median": 41.23456}, note="by hand")
    )
    assert lines[-2:] == ["reached: psnr_db_median 41.23", "by hand"]


def test_online_plans_say_that_they_decide_later():
    lines = drawn(plan(Rule(Site("span", 1), Gate(0.1))))
    assert "Gate(threshold=0.1" in lines[1] and lines[2].startswith("Decided while it runs")


@pytest.mark.parametrize("blocks", [0, 10**9])
def test_absurd_sizes_are_refused(blocks):
    whole = plan(Rule(Site(), Every(2)))
    odd = Plan(whole.recipe, Fingerprint("Foo", "0", blocks), 6)
    with pytest.raises(PlanError, match="nothing to draw"):
        drawn(odd)


def test_a_table_that_does_not_fit_its_blocks_is_refused():
    table = MaskTable(((0, 1), (0, 2)), 3)
    odd = Plan(Recipe((Rule(Site("block", 0, 3), table),)), Fingerprint("Foo", "0", 3), 3)
    with pytest.raises(PlanError, match="2 rows for 3"):
        drawn(odd)


def test_markup_in_a_plan_is_text():
    lines = drawn(plan(Rule(Site(), Every(2)), note="[bold red]hi[/]"))
    assert lines[-1] == "[bold red]hi[/]"
