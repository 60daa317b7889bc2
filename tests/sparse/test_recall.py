"""On queries and keys of known structure: who finds the blocks that matter."""

import pytest
import torch

from benchmarks.sparse_table import HEADS, PAGE, block_masses, filled, measure, structured
from blockcache.kernels.block_scores import antidiagonal_scores
from blockcache.kernels.select import Count, select_blocks
from blockcache.kernels.sparse_attention.reference import token_mask
from blockcache.plan.geometry import Geometry
from blockcache.sparse import by_name
from blockcache.sparse.pieces import mean_scores, pack
from blockcache.sparse.table import methods_table
from blockcache.sparse.tilings import frame_major, tiles
from sparse_toys import run

GRID = Geometry(8, 12, 12)


@pytest.fixture(scope="module")
def video():
    """q, k, v, and the exact mass of every pair of 32-token blocks in frame-major order."""
    q, k, v = structured(GRID)
    count = GRID.video // 32
    every = pack(torch.ones(1, 1, count, count, dtype=torch.bool), frame_major(GRID, 32))
    return q, k, v, block_masses(every, q, k)


def kept(mass, scores, count):
    """Share of the mass in each row's `count` blocks of highest score."""
    return ((mass * select_blocks(scores, Count(count))).sum() / mass.sum()).item()


def test_masses_are_the_masked_softmax(video):
    """Summed over a plan's own blocks they are what the plan keeps."""
    q, k, _, mass = video
    assert torch.allclose(mass.sum(-1), torch.full((), 32.0), atol=1e-3)
    tiling = tiles(GRID, (2, 5, 5), torch.device("cpu"))
    plan = pack(torch.rand(1, len(HEADS), tiling.count, tiling.count) < 0.3, tiling)
    weights = (q @ k.mT / q.shape[3] ** 0.5).softmax(-1)
    allowed = token_mask(plan, 1, len(HEADS), GRID.video, GRID.video)
    direct = (weights * allowed).sum((2, 3))
    assert torch.allclose((block_masses(plan, q, k) * plan.mask()).sum((2, 3)), direct, rtol=1e-4)


def test_scores_are_ordered_by_what_they_cost(video):
    """Exact, then antidiagonals of stride 4 and 8, all with a quarter of the blocks."""
    q, k, _, mass = video
    count = mass.shape[3] // 4
    share = {"exact": kept(mass, mass, count)}
    for stride in (4, 8):
        scores = antidiagonal_scores(q, k, stride=stride, block_q=32, block_k=32, layout="BHSD")
        share[stride] = kept(mass, scores, count)
    share["means"] = kept(mass, mean_scores(q, k, frame_major(GRID, 32), None), count)
    share["chance"] = kept(mass, torch.rand_like(mass), count)
    assert share["exact"] >= share[4] >= share[8] > share["chance"] + 0.4
    assert share["exact"] >= share["means"]
    assert share[4] >= share["means"] - 0.02
    assert share["exact"] - share["means"] < 0.03
    assert share["chance"] == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("name", "settings", "least"),
    [
        ("adaspa", {"density": 0.25, "block": 32}, 0.99),
        ("cubes", {"density": 0.25, "cube": (2, 4, 4)}, 0.95),
        ("nabla", {"tau": 0.7}, 0.95),
        ("sparge", {"amount": 0.25, "block_q": 32, "block_k": 32}, 0.97),
        ("moba", {"density": 0.25, "chunk": 32, "rows": 32}, 0.97),
        ("xattention", {"tau": 0.6, "block": 32}, 0.95),
        ("proxy_attn", {"tau": 0.6, "block": 32, "heads": 1}, 0.95),
        ("proxy_attn", {"tau": 0.6, "block": 32, "heads": 2}, 0.85),
        ("svg2", {"tau": 0.6, "query_clusters": 32, "key_clusters": 64}, 0.97),
        ("svg1", {"density": 0.2, "block": 32}, 0.75),
        ("pbs_attn", {"tau": 0.5, "block": 32, "segment": 128}, 0.9),
        ("vmoba", {"density": (0.25, 0.25, 0.25), "box": (2, 4, 4), "rows": 32}, 0.9),
    ],
)
def test_recall_against_the_exact_top_blocks(name, settings, least):
    """Of what as many blocks of the same layout could hold, at densities from 0.1 to 0.5."""
    found = measure(by_name(name, **settings), GRID)
    assert 0.1 < found.density < 0.5
    assert least * found.best <= found.recall <= found.best + 1e-6
    assert found.recall > 1.5 * found.density


def test_every_head_of_svg1_gets_its_band(video):
    """Heads that look inside their frame are spatial, heads that look along time temporal."""
    q, k, v, _ = video
    plan = run(by_name("svg1", density=0.2, block=32), GRID, q, k, v).decision.plan
    temporal = [bool(plan.q_order[0, h, 1] != 1) for h in range(len(HEADS))]
    for head, is_temporal in zip(HEADS, temporal, strict=True):
        if head in ("frame", "time"):
            assert is_temporal == (head == "time")


def test_stand_ins_and_memory_repair_what_is_left_out():
    """The same blocks: dropped, stood for by means, merged from three steps ago."""
    same = {"density": 0.15, "cube": (2, 4, 4)}
    dropped = measure(by_name("cubes", **same, centroids=False), GRID)
    means = measure(by_name("cubes", **same), GRID)
    inner = by_name("cubes", **same, centroids=False)
    merged = measure(by_name("flash_block", kept=inner), GRID, calls=4, drift=0.03)
    assert means.recall == pytest.approx(dropped.recall, abs=1e-6)
    assert means.error < 0.75 * dropped.error
    assert merged.error < 0.5 * means.error


def test_the_density_is_what_was_asked_for():
    """One share of mass for all heads: together they keep the density, each its own part."""
    q, k, v = structured(GRID)
    for density in (0.05, 0.25, 0.6):
        planner = by_name("cubes", density=density, cube=(2, 4, 4))
        got = run(planner, GRID, q, k, v).decision.density(GRID)[0]
        assert got.mean().item() == pytest.approx(density, abs=0.01)
        assert got.max() > 1.2 * got.min()


def test_the_page_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, "methods", methods_table()) == page, (
        "run python -m benchmarks.sparse_table --write"
    )
    assert page.count("| `") == 2 * methods_table().count("| `")
