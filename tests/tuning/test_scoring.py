import pytest

from blockcache.tuning.goal import goal_from
from blockcache.tuning.scoring import Distance, Ledger, Memory, Scorer

GOAL = goal_from(30.0, None, None, None, None, 0.5)


class Table(Scorer):
    """Figures that are known, one per item; notes which were asked for."""

    def __init__(self, figures):
        super().__init__(None, Ledger(), Memory())
        self.known, self.asked = figures, []

    def _figure(self, recipe, item, goal):
        self.asked.append(item)
        return self.known[item]

    def _distance(self, recipe, item):
        return Distance(self._figure(recipe, item, None), 0.0)


@pytest.mark.parametrize(
    ("figures", "needed", "is_reached", "runs"),
    [
        ([31.0, 31.0, 31.0, 31.0, 0.0, 0.0], 4, True, 4),
        ([31.0, 0.0, 31.0, 0.0, 0.0, 31.0], 4, False, 5),
        ([0.0, 31.0, 31.0, 31.0, 31.0, 31.0], 6, False, 1),
        ([31.0] * 6, 7, False, 1),
    ],
)
def test_no_more_runs_than_it_takes_to_know(figures, needed, is_reached, runs):
    scorer = Table(figures)
    assert scorer.reach(None, range(6), GOAL, needed) is is_reached
    assert scorer.asked == list(range(runs))


@pytest.mark.parametrize(("count", "half"), [(2, None), (4, 2), (7, 3), (8, 4)])
def test_what_is_clearly_behind_is_given_up_half_way(count, half):
    """At odd counts, too; one picture is too few to tell."""
    scorer, best = Table([10.0] * count), [Distance(30.0, 0.0)] * count
    found = scorer.beats(None, range(count), best)
    assert (found is None) == (half is not None)
    assert len(scorer.asked) == (half or count)
