"""What planners remember: how much, for how long, and for whom."""

import pytest
import torch

from blockcache.plan.geometry import Geometry
from blockcache.sparse import State, by_name
from blockcache.sparse.table import methods_table
from sparse_toys import SMALL, context, relative, run, small, tokens

GRID = Geometry(4, 6, 8)
ODD = Geometry(3, 5, 7)
TEXT = Geometry(4, 6, 8, before=5, after=11)
REMEMBER = ("adaspa", "flash_block", "rettention", "svg2", "svg_ear")


def steps(planner, geometry, seeds, state=None, first=3, **at):
    """Outputs of consecutive steps on different inputs."""
    state = state or State()
    outputs = []
    for n, seed in enumerate(seeds):
        q, k, v = tokens(geometry, seed=seed)
        outputs.append(run(planner, geometry, q, k, v, state, context(first + n, **at)).output)
    return outputs


@pytest.mark.parametrize("name", SMALL)
def test_branches_do_not_meet(name):
    """Two branches called in turn, a state each, are two runs of one branch."""
    planner, states = small(name), (State(), State())
    apart = [steps(planner, GRID, seeds) for seeds in ((1, 2, 3), (4, 5, 6))]
    for n, pair in enumerate(((1, 4), (2, 5), (3, 6))):
        for branch, seed in enumerate(pair):
            q, k, v = tokens(GRID, seed=seed)
            output = run(planner, GRID, q, k, v, states[branch], context(3 + n)).output
            assert torch.equal(output, apart[branch][n])


@pytest.mark.parametrize("name", SMALL)
def test_a_new_run_starts_afresh(name):
    planner, state = small(name), State()
    steps(planner, GRID, (1, 2, 3), state)
    again = steps(planner, GRID, (7, 8), state)
    for old, new in zip(again, steps(planner, GRID, (7, 8)), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("other", [ODD, TEXT, Geometry(8, 6, 4)], ids=["odd", "text", "turned"])
def test_another_size_starts_afresh(name, other):
    """Also where the number of tokens is the same: a static mask of the old grid would fit."""
    planner, state = small(name), State()
    steps(planner, GRID, (1, 2), state)
    changed = steps(planner, other, (7,), state, first=5)
    assert torch.equal(changed[0], steps(planner, other, (7,), first=5)[0])


@pytest.mark.parametrize("name", REMEMBER)
def test_another_dtype_batch_or_step_count_starts_afresh(name):
    planner = small(name)
    q, k, v = tokens(GRID, batch=2, seed=9)
    for change in ("dtype", "batch", "total"):
        state = State()
        steps(planner, GRID, (1, 2), state)
        at = context(5, total=20 if change == "total" else 10)
        inputs = [x[: 2 if change == "batch" else 1] for x in (q, k, v)]
        if change == "dtype":
            inputs = [x.half() for x in inputs]
        changed = run(planner, GRID, *inputs, state, at).output
        assert torch.equal(changed, run(planner, GRID, *inputs, State(), at).output)


@pytest.mark.parametrize("name", REMEMBER)
def test_memory_matters(name):
    """Otherwise the tests above would show nothing."""
    fresh = steps(small(name), GRID, (7,), first=5)[0]
    assert relative(steps(small(name), GRID, (1, 2, 7))[2], fresh) > 1e-3


@pytest.mark.parametrize("name", REMEMBER)
def test_refresh_on_demand(name):
    planner, state = small(name), State()
    steps(planner, GRID, (1, 2), state)
    q, k, v = tokens(GRID, seed=7)
    asked = run(planner, GRID, q, k, v, state, context(5, refresh=True)).output
    assert torch.equal(asked, run(planner, GRID, q, k, v, State(), context(5)).output)


@pytest.mark.parametrize("name", ["flash_block", "rettention"])
def test_refresh_schedule(name):
    """Every 3 steps; a step in which the site was not called delays nothing."""
    planner, state = small(name, every=3), State()
    refreshed = []
    for step in (1, 2, 3, 4, 5, 6, 9):
        q, k, v = tokens(GRID, seed=step)
        decision = run(planner, GRID, q, k, v, state, context(step)).decision
        refreshed.append(decision.refreshed)
        assert (decision.density(GRID).min() == 1) == decision.refreshed
    assert refreshed == [True, False, False, True, False, False, True]


def test_searches_of_adaspa():
    """At a fifth and three fifths of the run, whichever steps are seen, and at the first call."""
    planner = small("adaspa")
    for called, searched in [
        ((0, 1, 2, 3, 5, 6, 7), (0, 2, 6)),
        ((3, 4, 5, 7, 8), (3, 7)),
        ((8, 9), (8,)),
    ]:
        state, found = State(), []
        for step in called:
            q, k, v = tokens(GRID, seed=step)
            run(planner, GRID, q, k, v, state, context(step))
            if state.refreshed == step:
                found.append(step)
        assert tuple(found) == searched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_bytes(name, dtype):
    """The estimate, which budgets and the table go by, is what is held."""
    geometry, state = Geometry(4, 8, 16), State()
    for step in (4, 5, 6):
        q, k, v = (x.to(dtype) for x in tokens(geometry, heads=3, batch=2, head_dim=16))
        run(small(name), geometry, q, k, v, state, context(step))
    estimate = small(name).state_bytes(geometry, 2, 3, 16, dtype.itemsize)
    assert state.nbytes == pytest.approx(estimate, rel=0.05)
    assert (state.nbytes > 0) == (name in REMEMBER)
    state.clear()
    assert state.nbytes == 0


def test_masks_are_kept_as_bits():
    """512 tokens in blocks of 16: 32 x 32 blocks are 32 words a head."""
    geometry, state = Geometry(4, 8, 16), State()
    q, k, v = tokens(geometry)
    run(small("adaspa"), geometry, q, k, v, state)
    assert state.plan.bits.numel() == 2 * 32
    assert state.nbytes == 2 * 32 * 4 + 2 * 512 * 4


@pytest.mark.parametrize("inner", ["adaspa", "svg2", "svg_ear", "pbs_attn", "svg1", "sta"])
@pytest.mark.parametrize("name", ["flash_block", "rettention"])
def test_any_planner_can_be_inside(name, inner):
    """At a refresh exact, whatever it is that is kept; in between what was kept is kept."""
    planner, state = by_name(name, kept=small(inner), every=4), State()
    dense = steps(planner, GRID, (1,), state)[0]
    q, k, v = tokens(GRID, seed=1)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert relative(dense, exact) < 1e-6
    # The same input again: nothing has drifted yet. AdaSpa's first call was a dense search.
    for step in (4, 5):
        attended = run(planner, GRID, q, k, v, state, context(step))
        if not (name == "rettention" and step == 5 and inner != "adaspa"):
            assert relative(attended.output, exact) < 1e-6


def test_the_table_has_a_row_for_everyone():
    table = methods_table().splitlines()
    assert len(table) == 2 + len(SMALL)
    assert all(row.count("|") == 9 for row in table)
    (row,) = (row for row in table if row.startswith("| `flash_block`"))
    # 32,760 rows of 12 heads: 128 bf16 and one fp32 each, and 512 x 512 bits a head.
    mib = (32760 * 12 * (256 + 4) + 12 * 512 * 512 / 8) / 2**20
    assert row.endswith(f"{mib:.3g} MiB |")
