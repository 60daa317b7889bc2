"""What holds for every planner: text, dense limits, dtypes, layouts, memory, bad input."""

import dataclasses

import pytest
import torch

from blockcache.errors import PlanError
from blockcache.kernels.sparse_attention import SparsePlan
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import from_json, to_json
from blockcache.sparse import State, attend, by_name, function, names, sampled_recall
from blockcache.sparse.base import _open_unfit
from sparse_toys import (
    SMALL,
    chosen_tokens,
    context,
    dense,
    expand,
    masked_attention,
    relative,
    run,
    small,
    tokens,
    with_stand_ins,
)

DENSE = {
    "adaspa": {"density": 1.0}, "cubes": {"density": 1.0}, "flash_block": {"every": 1},
    "moba": {"density": 1.0}, "nabla": {"tau": 1.0}, "pbs_attn": {"tau": 1.0},
    "proxy_attn": {"tau": 1.0}, "radial": {"decay": 4.0}, "rettention": {"every": 1},
    "sparge": {"amount": 1.0}, "sta": {"sides": (9, 9, 9)}, "svg1": {"density": 1.0},
    "svg2": {"tau": 1.0}, "svg_ear": {"tau": 1.0}, "vmoba": {"density": (1.0, 1.0, 1.0)},
    "xattention": {"tau": 1.0},
}  # fmt: skip
EXACT_ON_WHAT_IT_KEEPS = [name for name in SMALL if name not in ("cubes", "svg_ear")]
GRID = Geometry(4, 6, 8)
ODD = Geometry(3, 5, 7)
TEXT = Geometry(4, 6, 8, before=5, after=11)


def sparse_run(planner, geometry, q, k, v, steps=2):
    """The last of `steps` steps: the first of some is dense."""
    state = State()
    for step in range(4, 4 + steps):
        attended = run(planner, geometry, q, k, v, state, context(step, layer=2))
    return attended


def with_text(mask, geometry):
    """A mask over the video's tokens within one over all tokens: text is dense both ways."""
    whole = torch.ones(*mask.shape[:2], geometry.tokens, geometry.tokens, dtype=torch.bool)
    video = slice(geometry.before, geometry.before + geometry.video)
    whole[:, :, video, video] = mask
    return whole


def test_every_planner_is_here():
    assert set(SMALL) == set(DENSE) == set(names())


@pytest.mark.parametrize("name", SMALL)
def test_data(name):
    """Planners are data: read back, equal, hashable, and found by name."""
    planner = small(name)
    again = from_json(to_json(planner))
    assert again == planner
    assert hash(again) == hash(planner)
    assert isinstance(planner, function(name))


@pytest.mark.parametrize("geometry", [GRID, ODD, TEXT], ids=["grid", "odd", "text"])
@pytest.mark.parametrize("name", SMALL)
def test_all_of_it_is_dense_attention(name, geometry):
    if name == "radial":
        # Two neighbouring frames see each other whole.
        geometry = dataclasses.replace(geometry, frames=2)
    q, k, v = tokens(geometry)
    attended = sparse_run(small(name, **DENSE[name]), geometry, q, k, v)
    assert relative(attended.output, dense(q, k, v)) < 1e-6
    assert attended.decision.density(geometry).min() == 1
    everything = torch.ones(1, 2, geometry.video, geometry.video, dtype=torch.bool)
    if name not in ("flash_block", "rettention"):
        assert torch.equal(chosen_tokens(attended, q, geometry), everything)


@pytest.mark.parametrize("geometry", [ODD, TEXT], ids=["odd", "text"])
@pytest.mark.parametrize("name", EXACT_ON_WHAT_IT_KEEPS)
def test_text_is_kept_and_orders_are_undone(name, geometry):
    """The output is the masked softmax in the input's own order, text dense both ways.

    What FlashBlock and Re-ttention add makes a repeated step exact.
    """
    q, k, v = tokens(geometry)
    attended = sparse_run(small(name), geometry, q, k, v)
    mask = chosen_tokens(attended, q, geometry)
    assert not mask.all()
    share = with_text(mask, geometry).float().mean((2, 3))
    assert (attended.decision.density(geometry) - share).abs().max() < 1e-6
    if name in ("flash_block", "rettention"):
        if name == "flash_block":
            assert relative(attended.output, dense(q, k, v)) < 1e-6
        return
    exact = masked_attention(q, k, v, with_text(mask, geometry))[0]
    assert relative(attended.output, exact) < 1e-6


def test_rettention_with_text():
    """Text counts as kept: at the second step rho is that of the first, so nothing has changed."""
    q, k, v = tokens(TEXT)
    attended = sparse_run(small("rettention"), TEXT, q, k, v)
    assert not attended.decision.refreshed
    assert relative(attended.output, dense(q, k, v)) < 1e-6


@pytest.mark.parametrize("name", ["cubes", "svg_ear"])
def test_stand_ins_with_text(name):
    q, k, v = tokens(TEXT)
    attended = sparse_run(small(name), TEXT, q, k, v)
    video = slice(TEXT.before, TEXT.before + TEXT.video)
    mask = chosen_tokens(attended, q, TEXT)[0]
    plan = attended.decision.plan
    blocks = []
    for h in range(2):
        order = plan.k_order[0, min(h, plan.k_order.shape[1] - 1)].tolist()
        if isinstance(plan.k_blocks, int):
            edges = list(range(0, TEXT.video + 1, plan.k_blocks))
        else:
            edges = plan.k_blocks[0, min(h, plan.k_blocks.shape[1] - 1)].tolist()
        blocks.append([order[a:b] for a, b in zip(edges, edges[1:], strict=False) if b > a])
    # Text keys are blocks of one token that everyone chose.
    keys, values = (
        torch.cat((x[:, :, video], x[:, :, :5], x[:, :, -11:]), 2) for x in (k, v)
    )  # fmt: skip
    text = [[TEXT.video + i] for i in range(16)]
    masks = [torch.cat((m, torch.ones(TEXT.video, 16, dtype=torch.bool)), 1) for m in mask]
    exact = with_stand_ins(q[:, :, video], keys, values, masks, [b + text for b in blocks])
    assert relative(attended.output[:, :, video], exact) < 1e-6
    around = torch.cat((attended.output[:, :, :5], attended.output[:, :, -11:]), 2)
    whole = dense(q, k, v)
    assert relative(around, torch.cat((whole[:, :, :5], whole[:, :, -11:]), 2)) < 1e-6


@pytest.mark.parametrize("name", ["cubes", "adaspa", "rettention"])
def test_padding_is_not_seen(name):
    """Two prompts of different lengths in one batch: each as if it had come alone, unpadded."""
    lengths = (TEXT.tokens - 4, TEXT.tokens)
    padded = dataclasses.replace(TEXT, valid=lengths)
    q, k, v = tokens(padded, batch=2)
    for x in (k, v):
        x[0, :, lengths[0] :] = 50.0
    output = sparse_run(small(name), padded, q, k, v).output
    for b, length in enumerate(lengths):
        alone = dataclasses.replace(TEXT, after=TEXT.after - (TEXT.tokens - length))
        one = [x[b : b + 1, :, :length] for x in (q, k, v)]
        expected = sparse_run(small(name), alone, *one).output
        assert relative(output[b : b + 1, :, :length], expected) < 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_batch_entries_do_not_meet(name):
    q, k, v = tokens(GRID, batch=2)
    both = sparse_run(small(name), GRID, q, k, v).output
    for b in range(2):
        alone = sparse_run(small(name), GRID, *(x[b : b + 1] for x in (q, k, v))).output
        assert relative(both[b : b + 1], alone) < 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_repeats_bit_for_bit_and_leaves_its_input_alone(name):
    q, k, v = tokens(TEXT)
    before = [x.clone() for x in (q, k, v)]
    first = sparse_run(small(name), TEXT, q, k, v).output
    assert torch.equal(first, sparse_run(small(name), TEXT, q, k, v).output)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_strides(name):
    """As the host's dispatcher hands them over: `[B, S, H, D]` transposed."""
    q, k, v = tokens(ODD)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert relative(
        sparse_run(small(name), ODD, *strided).output, sparse_run(small(name), ODD, q, k, v).output
    ) < 1e-6  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_half_precision(name, dtype):
    """Close to fp32 on the same rounded inputs; a block at the edge may fall the other way."""
    q, k, v = (x.to(dtype) for x in tokens(TEXT))
    output = sparse_run(small(name), TEXT, q, k, v).output
    assert output.dtype == dtype
    exact = sparse_run(small(name), TEXT, *(x.float() for x in (q, k, v))).output
    assert relative(output, exact) < 0.03


@pytest.mark.parametrize("name", SMALL)
def test_scale(name):
    """Twice the scale is twice the queries; k-means is left out, it clusters the queries."""
    if name.startswith("svg") and name != "svg1":
        pytest.skip("queries of another size make other clusters")
    q, k, v = tokens(GRID)
    state, other = State(), State()
    for step in (4, 5):
        doubled = attend(
            small(name), q, k, v, GRID, state, context(step, scale=2 * q.shape[3] ** -0.5)
        )
        expected = attend(small(name), 2 * q, k, v, GRID, other, context(step))
    assert relative(doubled.output, expected.output) < 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_not_a_number_is_dense_and_reported(which, bad):
    qkv = tokens(GRID)
    state = State()
    run(small("svg2"), GRID, *qkv, state, context(4))
    qkv[which][0, 1, 77, 3] = bad
    output, decision = run(small("svg2"), GRID, *qkv, state, context(5))
    assert output is None
    assert decision.is_dense and decision.reason == "not finite"
    assert decision.density(GRID).item() == 1
    assert state.nbytes == 0


def test_heads_with_nan_are_opened_without_a_host_read():
    """What stands for the above on a GPU."""
    plan = SparsePlan.from_mask(torch.rand(1, 3, 4, 40) < 0.3, 16, 16)
    opened = _open_unfit(plan, torch.tensor([[True, False, True]]))
    assert opened.mask()[0, 1].all()
    assert torch.equal(opened.mask()[:, [0, 2]], plan.mask()[:, [0, 2]])
    # Bits beyond the last block stay 0.
    assert opened.bits[0, 1, 0, 1] == 2**8 - 1


@pytest.mark.parametrize("name", SMALL)
def test_large_finite_values_are_fine(name):
    """The check for NaN adds numbers up and must not overflow."""
    q, k, v = (x.half() for x in tokens(GRID))
    v = v * 0 + 30000
    assert relative(sparse_run(small(name), GRID, q, k, v).output, v) < 2e-3


@pytest.mark.parametrize("name", SMALL)
def test_tables_made_in_inference_mode_serve_elsewhere(name):
    geometry = Geometry(2, 6, 8 + len(name))
    q, k, v = tokens(geometry)
    with torch.inference_mode():
        first = sparse_run(small(name), geometry, q, k, v).output.clone()
    assert torch.equal(first, sparse_run(small(name), geometry, q, k, v).output)


@pytest.mark.parametrize("name", ["cubes", "radial", "svg2"])
def test_gradients_are_refused(name):
    q, k, v = tokens(GRID)
    with torch.enable_grad(), pytest.raises(ValueError, match="no backward pass"):
        run(small(name), GRID, q.requires_grad_(), k, v)


def test_shapes_are_checked():
    q, k, v = tokens(GRID)
    with pytest.raises(PlanError, match="192 tokens; 4 frames of 6 x 7 make 168"):
        run(small("cubes"), Geometry(4, 6, 7), q, k, v)
    with pytest.raises(PlanError, match="Cross-attention stays with the host"):
        run(small("cubes"), GRID, q, k[:, :, :50], v)
    with pytest.raises(ValueError, match="backend='triton'"):
        run(small("cubes"), GRID, q, k, v, at=context(backend="triton"))


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("cubes", {"density": 0.0}, "density: .*greater than 0"),
        ("cubes", {"density": 1.5}, "density: .*less than or equal to 1"),
        ("cubes", {"density": float("nan")}, "density: "),
        ("cubes", {"cube": (4, 0, 4)}, "cube.1: "),
        ("adaspa", {"block": 96}, "96 tokens; it must be a power of two"),
        ("adaspa", {"searches": (1.0,)}, "searches.0: "),
        ("adaspa", {"row_step": 3}, "row_step is 3; it must be a power of two up to block"),
        ("adaspa", {"row_step": 128}, "row_step is 128; it must be a power of two up to block"),
        ("xattention", {"tau": 0}, "tau: "),
        ("xattention", {"tau": -0.1}, "tau: "),
        ("xattention", {"block": 100}, "100 tokens; it must be a power of two"),
        ("xattention", {"stride": 64}, "stride: "),
        ("xattention", {"max_density": 0.0}, "max_density: "),
        ("nabla", {"tau": 1.01}, "tau: "),
        ("nabla", {"patch": 1}, "from 2 to 64"),
        ("sparge", {"block_k": 8}, "8 tokens; it must be a power of two of at least 16"),
        ("sparge", {"similarity": 2.0}, "similarity: "),
        ("sparge", {"select": "best"}, "select: "),
        ("sta", {"sides": (2, 3, 3)}, "odd sides"),
        ("moba", {"rows": 8}, "8 tokens; it must be a power of two"),
        ("vmoba", {"density": (0.5, 0.0, 0.5)}, "density.1: "),
        ("pbs_attn", {"segment": 200}, "a multiple of the block"),
        ("svg2", {"min_ratio": 0.5, "max_density": 0.3}, "above max_density"),
        ("svg2", {"key_clusters": 0}, "key_clusters: "),
        ("radial", {"decay": 0.0}, "decay: "),
        ("rettention", {"every": 0}, "every: "),
        ("flash_block", {"kept": by_name("flash_block")}, "remembers the rest itself"),
        ("flash_block", {"kept": 3}, "kept: "),
        ("cubes", {"dens": 0.5}, "unknown field 'dens'"),
        ("kubes", {}, "unknown planner 'kubes'"),
    ],
)
def test_impossible_settings(name, settings, complaint):
    with pytest.raises(PlanError, match=complaint):
        by_name(name, **settings)


@pytest.mark.parametrize("geometry", [GRID, TEXT], ids=["grid", "text"])
@pytest.mark.parametrize("name", ["xattention", "svg2", "cubes"])
def test_recall_of_all_rows_is_exact(name, geometry):
    q, k, v = tokens(geometry)
    attended = sparse_run(small(name), geometry, q, k, v)
    got = sampled_recall(attended.decision, q, k, geometry, context(), rows=10**6)
    weights = (q @ k.mT / q.shape[3] ** 0.5).softmax(-1)
    mask = with_text(chosen_tokens(attended, q, geometry), geometry)
    kept = (weights * mask).sum(-1)[:, :, geometry.before : geometry.before + geometry.video]
    assert torch.allclose(got, kept.mean(-1), atol=1e-5)
    few = sampled_recall(attended.decision, q, k, geometry, context(), rows=32)
    assert (few - got).abs().max() < 0.15


def test_recall_leaves_padding_out():
    padded = dataclasses.replace(TEXT, valid=(TEXT.tokens - 6,))
    q, k, v = tokens(padded)
    k[:, :, -6:] = 40.0
    got = sparse_run(small("xattention"), padded, q, k, v)
    alone = dataclasses.replace(TEXT, after=TEXT.after - 6)
    expected = sampled_recall(got.decision, q[:, :, :-6], k[:, :, :-6], alone, context())
    assert torch.allclose(
        sampled_recall(got.decision, q, k, padded, context()), expected, atol=1e-6
    )


def test_recall_of_dense_is_one():
    q, k, v = tokens(GRID)
    first = run(small("adaspa"), GRID, q, k, v)
    assert sampled_recall(first.decision, q, k, GRID, context()).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 2, 3), (2, 3, 3), (1, 8, 8)])
@pytest.mark.parametrize("name", SMALL)
def test_a_video_of_few_tokens(name, grid):
    """Less than a block, or one: nothing can be left out of a single block."""
    geometry = Geometry(*grid, after=3)
    q, k, v = tokens(geometry, heads=1)
    output = sparse_run(small(name), geometry, q, k, v).output
    assert torch.isfinite(output).all()
    if geometry.video < 16 and name not in ("sta", "nabla", "vmoba"):
        assert relative(output, dense(q, k, v)) < 1e-6


@pytest.mark.parametrize("grid", [(5, 3, 9), (7, 9, 5), (2, 1, 67), (6, 4, 3), (1, 13, 11)])
@pytest.mark.parametrize("name", SMALL)
def test_no_query_is_left_without_keys(name, grid):
    """Radial's counting rule, taken as published, gives the rows of a short last block nothing."""
    geometry = Geometry(*grid)
    q, k, v = tokens(geometry)
    for planner in (small(name), by_name(name)):
        mask = chosen_tokens(sparse_run(planner, geometry, q, k, v), q, geometry)
        assert mask.any(-1).all()


def test_expand_is_what_the_tests_think():
    mask = expand([[0, 2], [1]], [[1], [0, 2]], {(0, 0)}, 3)
    assert mask.nonzero().tolist() == [[0, 1], [2, 1]]
