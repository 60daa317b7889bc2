"""Online gates on toys. The probe is block 0, whose residual at x is x + 1; behind it blocks 1 to 3
take y = 2 x + 1 to 8 y + 18, so the span's residual is 7 y + 18 = 14 x + 25."""

import math
from collections import Counter

import pytest
import torch

import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.plan import Cooldown, Gate, MaxStreak, Taylor, Warmup
from toys import Denoiser, Scheduler, branches, calls, column, drive, enable, static

REST = Site("span", 1)


def gated(**settings):
    guards = settings.pop("guards", ())
    predictor = settings.pop("predictor", Taylor(0))
    return Rule(REST, Gate(**settings), predictor, guards)


def pattern(model, branch=0):
    """1 where the blocks behind the probe were computed, per step."""
    return "".join(str(row[-1]) for row in branches(model)[branch]["map"])


def reused(x, anchor):
    """The output at x if the span's residual of input `anchor` is reused."""
    return 2 * x + 1 + 14 * anchor + 25


def plain(x):
    return 16 * x + 26


def test_change_since_the_last_computed_step():
    # Residuals 2, 2.125, 2.25, 2.5, 3: against 2 they change by 0, .0625, .125 (not below .125).
    xs = [1, 1, 1.125, 1.25, 1.5, 2.0]
    model = Denoiser()
    scheduler = enable(model, gated(threshold=0.125), steps=6)
    outputs = drive(model, scheduler, xs)
    # 1.25: residual 2.25 is the new reference; 2.5 differs from it by 1/9, below; 3 by 1/3.
    assert pattern(model) == "100101"
    assert outputs == pytest.approx(
        [plain(1), reused(1, 1), reused(1.125, 1), plain(1.25), reused(1.5, 1.25), plain(2)]
    )
    assert calls(model) == [6, 3, 3, 3]
    assert branches(model)[0]["decided"] == {"first step": 1, "reuse": 3, "threshold": 2}
    change = branches(model)[0]["change"]
    assert change["min"] == 0
    assert change["max"] == pytest.approx(1 / 3)
    assert change["median"] == pytest.approx(1 / 9)


def test_change_since_the_previous_step():
    xs = [1, 1, 1.125, 1.25, 1.5, 2.0]
    model = Denoiser()
    scheduler = enable(model, gated(threshold=0.125, reference="previous"), steps=6)
    # Changes 0, 1/16, 1/17, 1/9, 1/5.
    outputs = drive(model, scheduler, xs)
    assert pattern(model) == "100001"
    assert outputs[4] == pytest.approx(reused(1.5, 1))


def test_accumulated_changes():
    xs = [1, 1.125, 1.25, 1.375, 1.5, 1.625]
    model = Denoiser()
    rule = gated(threshold=0.15, reference="previous", accumulate=True)
    scheduler = enable(model, rule, steps=6)
    drive(model, scheduler, xs)
    # 1/16, + 1/17 = .121, + 1/18 = .177 computes and starts anew, 1/19 = .053, + 1/20 = .103.
    assert pattern(model) == "100100"


def test_threshold_zero_never_reuses():
    model, twin = Denoiser(), Denoiser()
    scheduler = enable(model, gated(threshold=0.0), steps=6)
    assert drive(model, scheduler, [1.0] * 6) == drive(twin, Scheduler(6), [1.0] * 6)
    assert calls(model) == [6] * 4
    assert branches(model)[0]["decided"] == {"first step": 1, "threshold": 5}


def test_an_all_zero_probe_computes():
    """0 / 0 is not a change below the threshold. Residual x + 1 is zero at x = -1."""
    model = Denoiser()
    scheduler = enable(model, gated(threshold=10.0), steps=4)
    assert drive(model, scheduler, [-1.0] * 4) == [plain(-1)] * 4
    assert calls(model) == [4] * 4


def test_a_nan_probe_computes():
    model = Denoiser()
    scheduler = enable(model, gated(threshold=10.0), steps=4)
    outputs = drive(model, scheduler, [1.0, math.nan, 1.0, 1.0])
    assert math.isnan(outputs[1])
    # NaN was computed and is the reference now: compared with it nothing is below.
    assert outputs[2] == plain(1)
    assert outputs[3] == reused(1, 1)
    assert calls(model) == [4, 3, 3, 3]


def test_guards_come_before_the_gate():
    guards = (Warmup(3), Cooldown(1), MaxStreak(2))
    model = Denoiser()
    scheduler = enable(model, gated(threshold=10.0, guards=guards), steps=10)
    drive(model, scheduler, [1.0] * 10)
    assert pattern(model) == "1110010011"
    assert branches(model)[0]["decided"] == {
        "first step": 1,
        "Warmup": 2,
        "MaxStreak": 2,
        "Cooldown": 1,
        "reuse": 4,
    }


def test_a_gate_with_linear_extrapolation():
    model = Denoiser()
    rule = gated(threshold=10.0, guards=(Warmup(2),), predictor=Taylor(1))
    scheduler = enable(model, rule, steps=5)
    # The span's residual is linear in x, and x in the step: the prediction is exact.
    assert drive(model, scheduler, range(5)) == [plain(x) for x in range(5)]
    assert calls(model) == [5, 2, 2, 2]


# Branches. Two calls a step; the second branch's changes are larger than the first one's.


def drive_two(model, scheduler, first, second):
    outputs = ([], [])
    conditioning = (torch.zeros(1), torch.ones(1))
    with torch.no_grad():
        for i, pair in enumerate(zip(first, second, strict=True)):
            scheduler.step_index = i
            for j, x in enumerate(pair):
                out = model(column(x), scheduler.timesteps[i], conditioning[j])
                outputs[j].append(out.item())
    return outputs


# Residuals x + 1. First: changes 0 throughout. Second: 2, 2, 2.5 (.25), 2.5, 2.5, 2.5.
STILL = [1.0] * 6
MOVING = [1.0, 1.0, 1.5, 1.5, 1.5, 1.5]


@pytest.mark.parametrize(
    ("how", "patterns"),
    [
        # The first branch decides and knows the second one's change of the step before: .25 in
        # step 2 is seen in step 3; there the references are renewed.
        ("joint", ("100100", "100100")),
        # The second one's change is never looked at.
        ("leader", ("100000", "100000")),
        # Each for itself.
        ("independent", ("100000", "101000")),
    ],
)
def test_branches_decide(how, patterns):
    model = Denoiser()
    scheduler = enable(model, gated(threshold=0.125), steps=6, branches=how)
    first, second = drive_two(model, scheduler, STILL, MOVING)
    assert (pattern(model, 0), pattern(model, 1)) == patterns
    assert first == [plain(1)] + [plain(1) if on == "1" else reused(1, 1) for on in patterns[0][1:]]
    anchor, expected = 1.0, []
    for x, on in zip(MOVING, patterns[1], strict=True):
        anchor = x if on == "1" else anchor
        expected.append(plain(x) if on == "1" else reused(x, anchor))
    assert second == pytest.approx(expected)


def test_state_is_kept_per_branch():
    """Far-apart branches: mixing up their residuals would be seen at once."""
    model = Denoiser()
    scheduler = enable(model, static(Site("stack"), 0, 2, total=4), steps=4)
    first, second = drive_two(model, scheduler, [0, 1, 2, 3], [100, 101, 102, 103])
    assert first == [26, 27, 58, 59]
    assert second == [1626, 1627, 1658, 1659]


# Two gates in one recipe.


@pytest.mark.parametrize("how", ["joint", "leader", "independent"])
def test_two_gates_behind_one_another(how):
    """Rule 0: span 1..2 behind block 0. Rule 1: block 3 behind blocks 0..2, whose residual moves
    since rule 0's payload stands still while x moves."""
    model = Denoiser()
    front = Rule(Site("span", 1, 3), Gate(0.2))
    back = Rule(Site("span", 3), Gate(0.01))
    scheduler = enable(model, front, back, steps=3, branches=how)
    # x = 1, 1.25, 2. Probe of rule 0: 2, 2.25 (.125: reuse), 3 (.5: compute).
    # Blocks 1, 2 take y to 4 y + 7, residual 3 y + 7 = 16 at y = 3. Probe of rule 1, blocks 0..2:
    # residuals 3 + 16 - 1 = 18, 3.5 + 16 - 1.25 = 18.25 (.0139: compute), 5 * 4 + 7 - 2 = 25 (too).
    outputs = drive(model, scheduler, [1.0, 1.25, 2.0])
    assert outputs == [plain(1), 2 * (3.5 + 16) + 4, plain(2)]
    assert calls(model) == [3, 2, 2, 3]


def test_a_gate_inside_a_static_rule():
    """While the wider static rule is reused there is no probe to measure, and nothing breaks."""
    model = Denoiser()
    wide = static(Site("stack"), 0, 1, 3, 4, total=6)
    scheduler = enable(model, wide, gated(threshold=10.0), steps=6)
    outputs = drive(model, scheduler, [1, 1, 1, 1, 1, 1])
    assert outputs == [plain(1)] * 6
    # Steps 2 and 5 as a whole; 1, 3 and 4 behind block 0.
    assert calls(model) == [4, 1, 1, 1]


# Host reads.

READERS = ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")


@pytest.fixture
def reads(monkeypatch):
    """Counts what moves values from a tensor to the host."""
    counted = Counter()
    for name in READERS:
        original = getattr(torch.Tensor, name)

        def counting(self, *args, _name=name, _original=original, **kwargs):
            counted[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    return counted


def reads_per_step(model, scheduler, reads, steps, calls_per_step=1):
    counts = []
    conditioning = [torch.full((1,), float(j)) for j in range(calls_per_step)]
    with torch.no_grad():
        for i in range(steps):
            scheduler.step_index = i
            reads.clear()
            for j in range(calls_per_step):
                model(column(1 + i / 64), scheduler.timesteps[i], conditioning[j])
            counts.append(sum(reads.values()))
    return counts


@pytest.mark.parametrize("site", [Site("stack"), Site("block"), REST], ids=lambda site: site.scope)
def test_a_static_plan_reads_nothing_after_the_first_step(reads, site):
    model = Denoiser()
    scheduler = enable(model, static(site, 0, 1, 4, predictor=Taylor(1)))
    assert reads_per_step(model, scheduler, reads, 10, calls_per_step=2)[1:] == [0] * 9


@pytest.mark.parametrize(("how", "expected"), [("joint", 1), ("leader", 1), ("independent", 2)])
def test_a_gate_reads_once_a_step(reads, how, expected):
    model = Denoiser()
    scheduler = enable(model, gated(threshold=0.05), branches=how)
    assert reads_per_step(model, scheduler, reads, 10, 2)[1:] == [expected] * 9
    # Residual 2 + i / 64: 7 / 128 is the first change above the threshold, then from anew.
    assert {b["reused"] for b in branches(model)} == {8}


def test_guarded_steps_need_no_read_for_the_decision(reads):
    """What a guard decides is known without looking; the changes are kept for the summary."""
    model = Denoiser()
    scheduler = enable(model, gated(threshold=0.05, guards=(Warmup(4),)))
    counts = reads_per_step(model, scheduler, reads, 10)
    assert max(counts[1:]) <= 1


def test_nothing_reused_is_said_with_numbers(caplog):
    model = Denoiser()
    scheduler = enable(model, gated(threshold=0.01), steps=10)
    xs = [2.0**i - 1 for i in range(10)]  # residual 2^i: doubles every step
    for _ in range(2):
        scheduler.set_timesteps(10)
        drive(model, scheduler, xs)
    (said,) = [r.getMessage() for r in caplog.records if "reused nothing" in r.getMessage()]
    assert "1 / 1 / 1 (min / median / max)" in said
    assert "threshold 0.01" in said
    assert "a threshold of 1 would have reused about 30 %" in said


def test_a_gate_needs_something_in_front_of_it():
    model = Denoiser()
    for site in (Site("stack"), Site("span", 0, 2)):
        with pytest.raises(blockcache.PlanError, match="needs blocks in front"):
            blockcache.enable(model, Recipe((Rule(site, Gate(0.1)),)))
    with pytest.raises(blockcache.PlanError, match="needs a 'stack', 'span' or 'model' site"):
        Rule(Site("block"), Gate(0.1))
    with pytest.raises(blockcache.BlockCacheError, match="nothing is enabled"):
        blockcache.summary(model)
