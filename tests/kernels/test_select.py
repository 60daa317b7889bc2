"""Selection on rows worked out by hand, and what must hold for any row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.kernels.select import CostGreedy, Count, MassBelow, MassKept, select_blocks

ROW = torch.tensor([[[[0.1, 0.4, 0.05, 0.3, 0.15]]]])


def chosen(rule, scores=ROW, **options):
    """Column numbers that are kept in the only row."""
    return select_blocks(scores, rule, **options)[0, 0, 0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("rule", "columns"),
    [
        (MassKept(0.39), [1]),
        (MassKept(0.5), [1, 3]),
        (MassKept(0.8), [1, 3, 4]),
        (MassKept(1e-6), [1]),
        (MassKept(1.0), [0, 1, 2, 3, 4]),
        (MassBelow(0.39), [1]),
        (MassBelow(0.5), [1]),
        (MassBelow(0.8), [1, 3]),
        (MassBelow(1.0), [0, 1, 2, 3, 4]),
        (Count(1), [1]),
        (Count(3), [1, 3, 4]),
        (Count(99), [0, 1, 2, 3, 4]),
    ],
)
def test_rules_by_hand(rule, columns):
    assert chosen(rule) == columns
    # A share of the row's sum: scaling the row changes nothing.
    assert chosen(rule, scores=ROW * 8) == columns


def test_greedy_by_hand():
    """Scores per cost are .01, .2, .05, .3, .0375; 3 costs 1, 1 costs 2, 2 costs 1, 4 costs 4."""
    cost = torch.tensor([[[[10.0, 2.0, 1.0, 1.0, 4.0]]]])
    for budget, columns in [(1, [3]), (2, [1, 3]), (3.5, [1, 2, 3]), (7, [1, 2, 3, 4])]:
        assert chosen(CostGreedy(cost, torch.tensor([[[float(budget)]]]))) == columns


def test_a_block_without_cost_comes_last():
    cost = torch.tensor([[[[1.0, 0.0, 1.0, 1.0, 1.0]]]])
    assert chosen(CostGreedy(cost, torch.tensor([[[2.0]]]))) == [3, 4]


@pytest.mark.parametrize("rule", [MassKept(0.45), Count(2)])
def test_ties_go_to_the_first_columns(rule):
    assert chosen(rule, scores=torch.full((1, 1, 1, 4), 0.25)) == [0, 1]


def test_limits():
    assert chosen(Count(1), min_blocks=3) == [1, 3, 4]
    assert chosen(Count(1), min_ratio=0.5) == [1, 3, 4]
    assert chosen(MassKept(1.0), max_ratio=0.5) == [1, 3]
    assert chosen(MassKept(1.0), max_ratio=0.01) == [1]
    zeros = torch.zeros(1, 1, 1, 5)
    assert chosen(MassKept(0.9), scores=zeros) == [0]
    assert chosen(MassKept(0.9), scores=zeros, min_blocks=0) == []


def test_forced_blocks():
    forced = torch.tensor([True, False, True, False, False])
    assert chosen(Count(2), forced=forced) == [0, 1, 2, 3]
    # The cap leaves room for one more than the two that are forced.
    assert chosen(Count(2), forced=forced, max_ratio=0.6) == [0, 1, 2]
    # Forced blocks stay even above the cap.
    assert chosen(Count(2), forced=forced, max_ratio=0.2) == [0, 2]
    # What is both forced and chosen counts once.
    assert chosen(Count(2), forced=forced.roll(1)) == [1, 3]


def test_budgets_per_head():
    scores = ROW.expand(2, 3, 4, 5)
    mask = select_blocks(scores, Count(torch.tensor([[1, 2, 4]])))
    assert mask.sum(-1)[:, :, 0].tolist() == [[1, 2, 4], [1, 2, 4]]
    mask = select_blocks(scores, MassKept(torch.tensor([[0.3], [0.8]])))
    assert mask.sum(-1)[:, :, 0].tolist() == [[1, 1, 1], [3, 3, 3]]


def test_nan_is_the_lowest_score():
    scores = ROW.clone()
    scores[..., 1] = torch.nan
    assert chosen(Count(2), scores=scores) == [3, 4]
    assert chosen(MassKept(0.7), scores=scores) == [3, 4]


@settings(max_examples=60, deadline=None)
@given(
    tau=st.floats(0.01, 1.0), columns=st.integers(1, 60), seed=st.integers(0, 999),
    floor=st.integers(0, 3), cap=st.floats(0.05, 1.0),
)  # fmt: skip
def test_masses_and_limits_hold_for_any_row(tau, columns, seed, floor, cap):
    torch.manual_seed(seed)
    scores = torch.rand(1, 2, 3, columns).square()
    total = scores.sum(-1)
    kept = select_blocks(scores, MassKept(tau))
    assert ((scores * kept).sum(-1) >= tau * total - 1e-5).all()
    # Dropping its smallest block would leave a row below tau.
    smallest = torch.where(kept, scores, torch.inf).min(-1).values
    assert ((scores * kept).sum(-1) - smallest <= tau * total + 1e-5).all()
    below = select_blocks(scores, MassBelow(tau))
    assert (((scores * below).sum(-1) <= tau * total + 1e-5) | (below.sum(-1) == 1)).all()
    # The published ascending form of rule A, NABLA's, chooses the same blocks away from its edge.
    low_first = scores.sort(-1)
    ascending = low_first.values.double().cumsum(-1) >= (1 - tau + 1e-9) * total.double()[..., None]
    ascending[..., -1] = True
    assert (
        torch.zeros_like(kept).scatter(-1, low_first.indices, ascending).sum(-1) - kept.sum(-1)
    ).abs().max() <= 1
    floor = min(floor, columns)
    limited = select_blocks(scores, MassKept(tau), min_blocks=floor, max_ratio=cap).sum(-1)
    assert (limited <= max(1, int(cap * columns))).all()
    assert (limited >= min(floor, max(1, int(cap * columns)))).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MassKept(0.0), "above 0 and at most 1"),
        (lambda: MassKept(1.5), "above 0 and at most 1"),
        (lambda: MassKept(float("nan")), "above 0 and at most 1"),
        (lambda: MassBelow(torch.tensor([[0.5, 0.0]])), "above 0 and at most 1"),
        (lambda: MassKept(torch.tensor(0.5)), r"must be \[B\|1, H\|1\]"),
        (lambda: Count(0), "at least 1 block"),
        (lambda: Count(torch.tensor([[0.5]])), "int32 or int64"),
        (lambda: CostGreedy(torch.ones(5), torch.ones(1)), r"cost \(5,\)"),
        (lambda: select_blocks(ROW[0], Count(1)), r"must be \[B, H, nQ, nK\]"),
        (lambda: select_blocks(ROW.long(), Count(1)), "floats"),
        (lambda: select_blocks(ROW, Count(1), max_ratio=0.0), "max_ratio above 0"),
        (lambda: select_blocks(ROW, Count(1), min_ratio=0.6, max_ratio=0.5), "min_ratio 0.6"),
        (lambda: select_blocks(ROW, Count(1), min_blocks=6), "min_blocks 6"),
        (lambda: select_blocks(ROW, Count(1), forced=torch.ones(5)), "must be bool"),
        (
            lambda: select_blocks(ROW, Count(1), forced=torch.ones(5, device="meta").bool()),
            "on cpu",
        ),
        (lambda: select_blocks(ROW, Count(1), forced=torch.ones(4).bool()), "must broadcast"),
        (lambda: select_blocks(ROW, Count(torch.tensor([[1, 2]]))), "must broadcast"),
        (lambda: select_blocks(ROW, Count(1), backend="gpu"), "supported are torch, triton"),
    ],
)
def test_bad_input_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
