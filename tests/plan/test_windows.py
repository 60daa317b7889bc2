"""Growing gaps, windows, shares of the run and of the blocks, by hand."""

import pytest

from blockcache.errors import PlanError
from blockcache.plan import (
    Cooldown,
    Every,
    Growing,
    Layout,
    MaskTable,
    Site,
    Step,
    Warmup,
    Within,
    even_steps,
)


def computed(policy, total=20, times=None):
    """The computed steps of the first of two units, which must be alike."""
    steps = even_steps(total)
    if times is not None:
        steps = [Step(i, total, 0.0, t) for i, t in enumerate(times)]
    first, second = policy.mask(steps, 2)
    assert first == second
    return [i for i, wanted in enumerate(first) if wanted]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # Gaps 2, 3, 4, ...: 2, 4, 7, 11, 16.
        (Growing(3, 2.0, 1.0), [0, 1, 2, 4, 7, 11, 16]),
        # 2, 2.5 and 3 in whole parts are 2, 2, 3, 3, 4.
        (Growing(1, 2.0, 0.5), [0, 2, 4, 7, 10, 14, 18]),
        # Without growth: TaylorSeer's schedule.
        (Growing(3, 6.0, 0.0), [0, 1, 2, 8, 14]),
        (Growing(99, 2.0, 1.0), list(range(20))),
    ],
)
def test_growing(policy, expected):
    assert computed(policy) == expected


def test_growing_reaches_the_published_counts():
    """Spectrum: 14 of 50 steps, and 10 with a growth of 3."""
    assert computed(Growing(), 50) == [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]
    assert computed(Growing(growth=3.0), 50) == [0, 1, 2, 3, 4, 6, 11, 19, 30, 44]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # Inside: steps 4 to 9. Counting begins there.
        (Within(Every(3), 0.4, 1.0), [0, 1, 2, 3, 4, 7]),
        (Within(Every(3), 0.0, 0.4), [0, 3, 4, 5, 6, 7, 8, 9]),
        (Within(Every(3), 0.35, 0.85), [0, 1, 2, 3, 4, 7, 9]),
        # Counted from the beginning of the run.
        (Within(Every(3), 0.4, 1.0, counting="run"), [0, 1, 2, 3, 6, 9]),
        (Within(MaskTable(((0, 8),), 10), 0.4, 1.0, counting="run"), [0, 1, 2, 3, 8]),
        # No step lies inside: everything is computed.
        (Within(Every(3), 0.41, 0.44), list(range(10))),
    ],
)
def test_within_a_share_of_the_run(policy, expected):
    assert computed(policy, 10) == expected


def test_within_timesteps():
    """A published window of 100 to 850, open at its upper end."""
    times = [1.0, 0.9, 0.85, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05]
    assert computed(Within(Every(2), 0.1, 0.85, "time"), 9, times) == [0, 1, 2, 3, 5, 7, 8]
    run = Within(Every(2), 0.1, 0.85, "time", "run")
    assert computed(run, 9, times) == [0, 1, 2, 4, 6, 8]


def test_unknown_times_count_as_even():
    steps = [Step(i, 10, 0.0) for i in range(10)]
    assert [step.noise_time for step in steps] == pytest.approx([1 - i / 10 for i in range(10)])
    assert computed(Within(Every(9), 0.25, 0.65, "time"), 10) == [0, 1, 2, 3, 4, 8, 9]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Within(Every(2), 0.5, 0.5),
        lambda: Within(Every(2), 0.8, 0.2),
        lambda: Within(Every(2), -0.1, 0.5),
        lambda: Within(Every(2), axis="sigma"),
        lambda: Within(Every(2), counting="there"),
        lambda: Growing(0),
        lambda: Growing(5, 0.5),
        lambda: Growing(5, 2.0, -1.0),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(PlanError):
        make()


# Guards as shares of the run.


@pytest.mark.parametrize(
    ("guard", "total", "expected"),
    [
        (Warmup(0.2), 20, [0, 1, 2, 3]),
        (Warmup(0.2), 7, [0, 1]),  # 1.4, rounded up
        (Warmup(0.14), 50, list(range(7))),  # 7, though 0.14 * 50 is more in floating point
        (Cooldown(0.25), 8, [6, 7]),
        (Cooldown(0.1), 7, [6]),
    ],
)
def test_guards_of_a_share(guard, total, expected):
    steps = [Step(i, total, 0.0) for i in range(total)]
    assert [step.index for step in steps if guard.must_compute(step, 0)] == expected


# Sites that depend on the model's shape.


@pytest.mark.parametrize(
    ("site", "blocks", "expected"),
    [
        (Site("span", 0.25), 4, (1, 4)),
        (Site("span", 0, 0.75), 28, (0, 21)),
        (Site("span", 1, 0.71), 28, (1, 20)),
        (Site("span", 0.14, 0.9), 57, (8, 51)),
        (Site("deep", 2, -2), 7, (2, 5)),
    ],
)
def test_limits(site, blocks, expected):
    assert site.limits(blocks) == expected


CHAIN, UNET = Layout((7,)), Layout((7,), unet=True)


@pytest.mark.parametrize(
    "site",
    [Site("deep", 1, -1), Site("span", 1), Site("span", 2, 6), Site("span", 0, 1), Site("block")],
)
def test_sites_that_fit_a_unet(site):
    site.check(UNET)


@pytest.mark.parametrize(
    ("site", "layout", "why"),
    [
        (Site("deep", 1, -1), CHAIN, "plain chain of blocks"),
        (Site("span", 0, -1), UNET, "block 0 also feeds block 6"),
        (Site("span", 1, 5), UNET, "block 1 also feeds block 5"),
        (Site("deep", 1, 5), UNET, "block 1 also feeds block 5"),
        (Site("span", 0, 9), UNET, "does not fit a model of 7 blocks"),
    ],
)
def test_sites_that_do_not_fit_the_shape(site, layout, why):
    with pytest.raises(PlanError, match=why):
        site.check(layout)


def test_a_deep_site_is_one_unit():
    assert Site("deep", 1, -1).units(UNET) == ((1, 6),)
