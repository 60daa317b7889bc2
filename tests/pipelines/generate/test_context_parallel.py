"""One picture's tokens split over several processes by diffusers' context parallelism.

Ranks that decide differently wait for each other for ever: a gate that looked at its own tokens
alone hung here.
"""

import queue
from itertools import count

import numpy as np
import pytest

from blockcache import Recipe, Sparse, recipes
from blockcache.sparse import by_name
from generate_toys import split_in_child
from sparse_toys import SMALL

PATIENCE_S = 120
_meetings = count()


@pytest.fixture
def render(children, tmp_path):
    """`render(world, "flux", recipe, **size)`: each rank's picture and map of computed blocks."""
    running = []

    def render(world, name, what, **size):
        answers = children.Queue()
        meeting = str(tmp_path / f"meeting-{next(_meetings)}")
        for rank in range(world):
            arguments = (rank, world, name, what, meeting, answers)
            running.append(children.Process(target=split_in_child, args=arguments, kwargs=size))
            running[-1].start()
        try:
            found = [answers.get(timeout=PATIENCE_S) for _ in range(world)]
        except queue.Empty:
            pytest.fail(f"{world} processes wait for each other")
        return [(picture, maps) for _, picture, maps in sorted(found, key=lambda one: one[0])]

    yield render
    for process in running:
        process.kill()
        process.join()


def reused(maps) -> int:
    return sum(1 - computed for branch in maps for step in branch for computed in step)


PLANS = {
    "static": recipes.geometric(0.4),
    "gate": recipes.first_block(0.3),
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("flux", "static"),
        ("flux", "gate"),
        ("wan", "gate"),
        ("wan", "static"),
    ],
)
def test_split_tokens_change_no_decision_and_no_picture(render, name, plan, world):
    ((picture, maps),) = render(1, name, PLANS[plan])
    assert 0 < reused(maps) < sum(len(step) for branch in maps for step in branch)
    for theirs, their_maps in render(world, name, PLANS[plan]):
        assert their_maps == maps
        assert np.abs(theirs - picture).max() < 1e-4


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_split_tokens_alone_change_nothing(render, name):
    """What the others are measured by: diffusers' own part is right on the CPU."""
    ((picture, _),) = render(1, name, None)
    for theirs, _ in render(2, name, None):
        assert np.abs(theirs - picture).max() < 1e-4


@pytest.mark.parametrize("name", ["wan", "flux"])
@pytest.mark.parametrize("world", [2, 4])
def test_split_heads_are_sparse_like_the_unsplit_run(render, world, name):
    """Each process has all tokens of some heads, and plans for these."""
    size = {"height": 64, "width": 64}
    limits = {"dense_steps": 0, "dense_layers": 0, "min_length": 0, "max_density": 1.0}
    what = Recipe(sparse=Sparse(by_name("sparge", **SMALL["sparge"]), **limits), name="sparse")
    ((dense, _),) = render(1, name, None, **size)
    ((picture, _),) = render(1, name, what, **size)
    assert np.abs(dense - picture).max() > 0.01
    for theirs, _ in render(world, name, what, **size):
        assert np.abs(theirs - picture).max() < 1e-4
