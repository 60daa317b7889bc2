"""Sparse attention where diffusers splits the tokens over processes.

Its all-to-all hands every process all tokens of some of the heads, so a planner sees whole videos
and fewer heads. Methods that decide for each head alone choose the same blocks as in one process
(`tests/pipelines/generate/test_context_parallel.py`); those that share a budget among heads share
it among those of one process. Nobody asks another process, so nobody can wait for ever.
"""

import multiprocessing
import queue

import numpy as np
import pytest

from blockcache import recipes
from blockcache.plan import Recipe
from blockcache.plan.sparse_rule import Sparse
from blockcache.sparse import by_name
from generate_toys import split_in_child

PATIENCE_S = 240
SIZE = {"height": 64, "width": 64}
LIMITLESS = dict(dense_steps=1, dense_layers=0, min_length=0, max_density=1.0)
MOBA = Sparse(by_name("moba", density=0.5, chunk=16, rows=16), **LIMITLESS)
CUBES = Sparse(by_name("cubes", density=0.4, cube=(1, 2, 2)), **LIMITLESS)
CACHING = recipes.geometric(0.5).rules


@pytest.fixture
def render(tmp_path):
    """`render(world, recipe)`: each rank's picture and map of computed blocks."""
    context = multiprocessing.get_context("spawn")
    running = []

    def render(world, what):
        answers = context.Queue()
        meeting = str(tmp_path / f"meeting-{len(running)}")
        for rank in range(world):
            arguments = (rank, world, "wan", what, meeting, answers)
            child = context.Process(target=split_in_child, args=arguments, kwargs=SIZE)
            running.append(child)
            child.start()
        try:
            found = [answers.get(timeout=PATIENCE_S) for _ in range(world)]
        except queue.Empty:
            pytest.fail(f"{world} processes wait for each other")
        return [rest for _, *rest in sorted(found, key=lambda one: one[0])]

    yield render
    for process in running:
        process.kill()
        process.join()


@pytest.mark.slow
def test_caching_and_sparse_attention_together(render):
    recipe = Recipe(CACHING, sparse=MOBA)
    ((cached, _),) = render(1, Recipe(CACHING))
    ((picture, maps),) = render(1, recipe)
    assert np.abs(picture - cached).max() > 0.01
    assert 0 < sum(not any(step) for branch in maps for step in branch)
    for theirs, their_maps in render(2, recipe):
        assert their_maps == maps
        assert np.abs(theirs - picture).max() < 1e-4


@pytest.mark.slow
def test_a_budget_shared_by_heads_is_shared_inside_a_process(render):
    """Not the same blocks as in one process, but the same on all, and no worse."""
    recipe = Recipe(sparse=CUBES)
    ((dense, _),) = render(1, None)
    ((picture, _),) = render(1, recipe)
    (first, _), (second, _) = render(2, recipe)
    assert np.array_equal(first, second)
    alone, apart = (np.abs(made - dense).mean() for made in (picture, first))
    assert 0.5 * alone < apart < 1.5 * alone
