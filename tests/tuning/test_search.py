import pytest

from blockcache.plan import MaskTable, Recipe, Rule, Site
from blockcache.tuning.goal import OWN
from blockcache.tuning.scoring import Distance, Exhausted, Ledger, Memory, score
from blockcache.tuning.search import Search

T, GOAL = 20, (0, 2, 4, 7, 11, 15)
ITEMS = [("a", 0), ("b", 1), ("c", 2), ("d", 3)]


def far(computed):
    """How far a mask is from the one that is best."""
    return sum(abs(a - b) for a, b in zip(computed, GOAL, strict=True))


class Scorer:
    """Real runs that cost nothing: the nearer to GOAL the more decibels."""

    def __init__(self):
        self.asked = []

    def distance(self, computed, items):
        self.asked.append(computed)
        return [Distance(40.0 - far(computed), 50.0) for _ in items]

    def beats(self, computed, items, best):
        found = self.distance(computed, items)
        return found if score(found) > score(best) - 0.5 else None


class Screen:
    """A screen that finds all masks alike; sums of steps tell them apart."""

    total = T

    def cost(self, computed, amplification=1.0):
        return 1.0 + 1e-3 * abs(sum(computed) - sum(GOAL))


@pytest.fixture
def search():
    return Search(Screen(), Scorer(), ITEMS, make=lambda computed, shape: computed)


def test_the_climb_finds_the_best_mask_and_runs_nothing_twice(search):
    start = search.best_of([("start", (0, 1, 3, 9, 10, 18))])
    found = search.climb(start, 500)
    assert found.computed == GOAL and found.origin == "climbed"
    assert found.score == 0.5 * 40 + 0.5 * 50
    assert len(set(search.scorer.asked)) == len(search.scorer.asked)


def test_the_climb_stops_at_its_limit(search):
    start = search.best_of([("start", (0, 1, 3, 9, 10, 18))])
    search.scorer.asked.clear()
    search.climb(start, 7)
    assert len(search.scorer.asked) == 7


def test_the_best_of_some_masks_wins(search):
    masks = [
        ("far", (0, 1, 2, 3, 4, 5)),
        ("near", (0, 2, 4, 7, 11, 16)),
        ("mid", (0, 2, 4, 7, 9, 12)),
    ]
    found = search.best_of(masks)
    assert (found.origin, found.computed) == masks[1] and found.score == 0.5 * 39 + 0.5 * 50


def test_hopeless_moves_are_not_run(search, monkeypatch):
    monkeypatch.setattr(Screen, "cost", lambda self, mask, a=1.0: 1.0 if mask == GOAL else 2.0)
    start = search.best_of([("start", GOAL)])
    search.scorer.asked.clear()
    assert search.climb(start, 100) is start and search.scorer.asked == []


def test_one_step_less_or_more(search):
    assert set(search.shorter(GOAL)) < set(GOAL) and len(search.shorter(GOAL)) == len(GOAL) - 1
    assert set(search.longer(GOAL)) > set(GOAL) and len(search.longer(GOAL)) == len(GOAL) + 1
    assert search.shorter(GOAL)[0] == 0


def test_the_ledger_counts_in_uncached_runs_and_stops():
    ledger = Ledger(most_runs=3.0)
    assert ledger.runs == 0
    ledger.learn(2.0)
    ledger.charge(1.0)
    assert ledger.runs == 0.5
    ledger.charge(2.0, is_uncached=True)
    ledger.charge(3.0)
    ledger.check()
    ledger.charge(0.5)
    with pytest.raises(Exhausted, match="limit of 3 runs"):
        ledger.check()
    with pytest.raises(Exhausted, match="time limit"):
        Ledger(deadline=0.0).check()


def test_what_was_counted_stays_when_the_machine_gets_faster():
    ledger = Ledger()
    ledger.learn(2.0)
    ledger.charge(20.0)
    for _ in range(10):
        ledger.charge(1.0, is_uncached=True)
    assert ledger.runs == 20 and ledger.run_s == 1.0
    ledger.charge(5.0)
    assert ledger.runs == 25


def test_memory_survives_a_search_that_was_killed_while_writing(tmp_path):
    file = tmp_path / "runs.jsonl"
    recipes = [Recipe((Rule(Site(), MaskTable(((0, k),), 5)),)) for k in (1, 2)]
    memory = Memory(file)
    for k, recipe in enumerate(recipes):
        memory.keep(recipe, ("a", 0), "latents", {"db": float(k)})
    file.write_text(file.read_text() + '{"key": "half a li')
    again = Memory(file)
    assert again.find(recipes[0], ("a", 0), "latents")["db"] == 0.0
    assert again.find(recipes[1], ("a", 0), "latents")["db"] == 1.0
    assert again.find(recipes[1], ("a", 1), "latents") is None
    assert again.find(recipes[1], ("a", 0), "psnr_db") is None
    again.keep(recipes[1], ("a", 1), "latents", {"db": 2.0})
    assert Memory(file).find(recipes[1], ("a", 1), "latents")["db"] == 2.0


def test_figures_of_ones_own_are_not_remembered_beyond_the_process(tmp_path):
    """The next one's function may be another."""
    recipe = Recipe((Rule(Site(), MaskTable(((0, 1),), 5)),))
    memory = Memory(tmp_path / "runs.jsonl")
    memory.keep(recipe, ("a", 0), OWN, {"figure": 1.0})
    memory.keep(recipe, ("a", 0), "psnr_db", {"figure": 2.0})
    assert memory.find(recipe, ("a", 0), OWN)["figure"] == 1.0
    again = Memory(tmp_path / "runs.jsonl")
    assert again.find(recipe, ("a", 0), OWN) is None
    assert again.find(recipe, ("a", 0), "psnr_db")["figure"] == 2.0
