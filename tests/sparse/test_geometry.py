"""Geometry and tilings: sizes, errors, and that every order is undone."""

import pytest
import torch

from blockcache.errors import PlanError
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import from_json, to_json
from blockcache.sparse.pieces import window
from blockcache.sparse.tilings import frame_major, tiles, token_major
from sparse_toys import boxes, places

CPU = torch.device("cpu")


def test_sizes():
    geometry = Geometry(3, 4, 5, before=7, after=2)
    assert (geometry.video, geometry.frame, geometry.tokens, geometry.others) == (60, 20, 69, 9)
    assert geometry.grid == (3, 4, 5)
    assert geometry.bare == Geometry(3, 4, 5)
    geometry.check(69, batch=3)


def test_round_trip():
    geometry = Geometry(3, 4, 5, after=4, valid=(62, 64))
    assert from_json(to_json(geometry)) == geometry


def test_another_length():
    with pytest.raises(PlanError, match=r"70 tokens; 3 frames of 4 x 5 \+ 9 others make 69"):
        Geometry(3, 4, 5, 7, 2).check(70, 1)
    with pytest.raises(PlanError, match="61 tokens; 3 frames of 4 x 5 make 60"):
        Geometry(3, 4, 5).check(61, 1)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"frames": 0}, "frames: "),
        ({"height": -1}, "height: "),
        ({"width": 2.5}, "width: "),
        ({"before": -1}, "before: "),
        ({"after": 4, "valid": (65,)}, "each must be from 60 to 64"),
        ({"after": 4, "valid": (64, 59)}, "Padding inside the video"),
    ],
)
def test_impossible_sizes(sizes, complaint):
    with pytest.raises(PlanError, match=complaint):
        Geometry(**{"frames": 3, "height": 4, "width": 5, **sizes})


def test_valid_lengths_of_another_batch():
    with pytest.raises(PlanError, match="2 lengths for a batch of 1"):
        Geometry(3, 4, 5, after=4, valid=(62, 64)).check(64, 1)


TILINGS = {
    "frame_major": lambda g: frame_major(g, 16),
    "token_major": lambda g: token_major(g, 16, CPU),
    "patches": lambda g: tiles(g, (1, 4, 4), CPU),
    "cubes": lambda g: tiles(g, (2, 4, 4), CPU),
    "tiles": lambda g: tiles(g, (3, 2, 5), CPU),
    "chunks in time": lambda g: tiles(g, (2, g.height, g.width), CPU),
    "chunks in space": lambda g: tiles(g, (g.frames, 3, 4), CPU),
    "larger than the video": lambda g: tiles(g, (99, 99, 99), CPU),
}


@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 5, 7), (1, 9, 4), (5, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("name", TILINGS)
def test_every_token_is_in_one_block(name, grid):
    geometry = Geometry(*grid)
    tiling = TILINGS[name](geometry)
    if tiling.order is not None:
        assert torch.equal(tiling.order[0, 0].sort().values, torch.arange(geometry.video).int())
    if isinstance(tiling.blocks, int):
        assert tiling.count == -(-geometry.video // tiling.blocks)
    else:
        offsets = tiling.blocks[0, 0]
        assert offsets[0] == 0 and offsets[-1] == geometry.video
        assert len(offsets) == tiling.count + 1
        assert (offsets.diff() > 0).all()
    assert tiling.coordinates(CPU).shape == (tiling.count, 3)


@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 5, 7)])
@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 3, 2), (2, 5, 8)])
def test_a_tile_is_a_box(grid, shape):
    geometry = Geometry(*grid)
    tiling = tiles(geometry, shape, CPU)
    expected = boxes(geometry, shape)
    sizes = [len(tokens) for tokens in expected.values()]
    if isinstance(tiling.blocks, int):
        assert set(sizes) == {tiling.blocks}
    else:
        assert tiling.blocks.diff(dim=-1)[0, 0].tolist() == sizes
    assert tiling.order[0, 0].tolist() == [t for tokens in expected.values() for t in tokens]
    assert tiling.coordinates(CPU).tolist() == [list(place) for place in expected]


def test_blocks_have_one_size_only_where_the_grid_divides():
    assert tiles(Geometry(4, 8, 8), (2, 4, 4), CPU).blocks == 32
    # 24 is no power of two, 8 is below what kernels take.
    assert isinstance(tiles(Geometry(4, 8, 9), (2, 4, 3), CPU).blocks, torch.Tensor)
    assert isinstance(tiles(Geometry(4, 8, 8), (2, 2, 2), CPU).blocks, torch.Tensor)


def test_token_major_by_hand():
    assert token_major(Geometry(3, 1, 2), 16, CPU).order[0, 0].tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("clamped", [True, False])
def test_windows(clamped):
    tiling = tiles(Geometry(5, 4, 1), (1, 1, 1), CPU)
    mask = window(tiling, (3, 3, 1), CPU, clamped)[0, 0]
    cells = places(Geometry(5, 4, 1))
    for i, (t, h, _) in enumerate(cells):
        if clamped:
            t, h = min(max(t, 1), 3), min(max(h, 1), 2)
        seen = {j for j, (a, b, _) in enumerate(cells) if abs(a - t) <= 1 and abs(b - h) <= 1}
        assert set(mask[i].nonzero().flatten().tolist()) == seen
        if clamped:
            assert len(seen) == 9


def test_a_window_larger_than_the_video_sees_all():
    tiling = tiles(Geometry(2, 2, 2), (1, 1, 1), CPU)
    assert window(tiling, (5, 5, 5), CPU, clamped=True).all()
