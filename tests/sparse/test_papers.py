"""Each planner against its paper's rule written out in plain loops, on small sizes."""

import math

import pytest
import torch

from blockcache.plan.geometry import Geometry
from blockcache.sparse import State, by_name
from blockcache.sparse.rettention import FrameBand
from sparse_toys import (
    boxes,
    chosen_tokens,
    context,
    cuts,
    dense,
    expand,
    fewest,
    largest,
    masked_attention,
    means,
    places,
    relative,
    run,
    softmax,
    tokens,
    with_stand_ins,
)

ODD = Geometry(3, 5, 7)
LINE = Geometry(4, 5, 8)


def check_plain(planner, geometry, expected, **settings):
    """Decisions equal the expected token masks, outputs the masked softmax."""
    q, k, v = tokens(geometry)
    attended = run(planner, geometry, q, k, v, at=context(**settings))
    masks = torch.stack([expected(q[0, h], k[0, h], v[0, h]) for h in range(q.shape[1])])[None]
    assert 0.02 < masks.float().mean() < 0.98
    assert torch.equal(chosen_tokens(attended, q, geometry), masks)
    assert relative(attended.output, masked_attention(q, k, v, masks)[0]) < 1e-6


def pooled(q, k, blocks_q, blocks_k=None, sized=True):
    """Row by row the softmax between block means, a block weighing as its tokens."""
    blocks_k = blocks_k or blocks_q
    scale = 1 / math.sqrt(q.shape[-1])
    rows = []
    for mean_q in means(q, blocks_q):
        logits = [
            float(mean_q @ mean_k) * scale + (math.log(len(block)) if sized else 0.0)
            for mean_k, block in zip(means(k, blocks_k), blocks_k, strict=True)
        ]
        rows.append(softmax(logits))
    return rows


def antidiagonals(q, k, stride, block):
    """XAttention's mass of block pairs; the length is a multiple of the stride."""
    cells = len(q) // stride
    scale = 1 / math.sqrt(q.shape[-1])
    mass = torch.zeros(-(-len(q) // block), -(-len(k) // block), dtype=torch.float64)
    for m in range(cells):
        logits = []
        for n in range(cells):
            products = [
                float(q[stride * m + stride - 1 - j].double() @ k[stride * n + j].double())
                for j in range(stride)
            ]
            logits.append(scale * sum(products) / stride)
        for n, share in enumerate(softmax(logits)):
            mass[stride * m // block, stride * n // block] += share
    return mass


def test_xattention():
    blocks = cuts(LINE.video, 16)

    def expected(q, k, v):
        mass = antidiagonals(q, k, 4, 16)
        pairs = {(i, j) for i, row in enumerate(mass) for j in fewest(row, 0.6)}
        return expand(blocks, blocks, pairs, LINE.video)

    check_plain(by_name("xattention", tau=0.6, stride=4, block=16), LINE, expected)


@pytest.mark.parametrize("sta", [None, (3, 1, 3)])
@pytest.mark.parametrize("geometry", [ODD, Geometry(2, 8, 8)])
def test_nabla(geometry, sta):
    patches = boxes(geometry, (1, 4, 4))
    blocks = list(patches.values())

    def expected(q, k, v):
        pairs = {(i, j) for i, row in enumerate(pooled(q, k, blocks)) for j in fewest(row, 0.5)}
        for i, a in enumerate(patches):
            for j, b in enumerate(patches):
                apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
                if sta and all(d <= side // 2 for d, side in zip(apart, sta, strict=True)):
                    pairs.add((i, j))
        return expand(blocks, blocks, pairs, geometry.video)

    check_plain(by_name("nabla", tau=0.5, sta=sta, patch=4), geometry, expected)


def cosine_likeness(x, block):
    rows = [x[i].double() / x[i].double().norm() for i in block]
    return sum(float(a @ b) for a in rows for b in rows) / len(rows) ** 2


@pytest.mark.parametrize(("select", "amount"), [("count", 0.3), ("mass", 0.7)])
def test_sparge(select, amount):
    blocks_q, blocks_k = cuts(LINE.video, 32), cuts(LINE.video, 16)
    theta = 0.35

    def expected(q, k, v):
        doubtful_q = [cosine_likeness(q, block) <= theta for block in blocks_q]
        doubtful_k = [cosine_likeness(k, block) <= theta for block in blocks_k]
        assert 0 < sum(doubtful_k) < len(doubtful_k)
        pairs = set()
        for i, mean_q in enumerate(means(q, blocks_q)):
            logits = [
                -math.inf if doubt else float(mean_q @ mean_k) / math.sqrt(q.shape[-1])
                for mean_k, doubt in zip(means(k, blocks_k), doubtful_k, strict=True)
            ]
            row = softmax(logits)
            if select == "count":
                kept = largest(row, int(amount * len(blocks_k)))
            else:
                kept, held = [], 0.0
                for j in largest(row, len(row)):
                    held += float(row[j])
                    if kept and held > amount:
                        break
                    kept.append(j)
            for j in range(len(blocks_k)):
                if j in kept or doubtful_q[i] or doubtful_k[j]:
                    pairs.add((i, j))
        return expand(blocks_q, blocks_k, pairs, LINE.video)

    planner = by_name(
        "sparge", select=select, amount=amount, similarity=theta, block_q=32, block_k=16
    )
    check_plain(planner, LINE, expected)


@pytest.mark.parametrize("geometry", [Geometry(4, 7, 9), Geometry(5, 8, 12)])
def test_sta(geometry):
    tile, sides = (1, 2, 4), (3, 3, 1)
    found = boxes(geometry, tile)
    blocks, grid = list(found.values()), [max(b[a] for b in found) + 1 for a in range(3)]

    def expected(q, k, v):
        pairs = set()
        for i, a in enumerate(found):
            centre = [
                max(side // 2, min(x, n - 1 - side // 2))
                for x, n, side in zip(a, grid, sides, strict=True)
            ]
            for j, b in enumerate(found):
                apart = [abs(x - y) for x, y in zip(centre, b, strict=True)]
                if all(d <= side // 2 for d, side in zip(apart, sides, strict=True)):
                    pairs.add((i, j))
        counts = [sum(1 for i, _ in pairs if i == row) for row in range(len(blocks))]
        assert len(set(counts)) == 1, "border tiles see as many tiles as others"
        return expand(blocks, blocks, pairs, geometry.video)

    check_plain(by_name("sta", tile=tile, sides=sides), geometry, expected)


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("decay", [0.5, 2.0])
def test_radial(decay, sink):
    """Token masks of every pair of frames, each shrunk to blocks by the published counting rule."""
    geometry, size = Geometry(9, 6, 7), 16
    frame, blocks = geometry.frame, cuts(geometry.video, size)

    def pair(distance, everything):
        base = 2 ** frame.bit_length() / 2 ** distance.bit_length()
        if not everything and base < size and distance % int(size / base):
            return None
        reach = frame if everything or distance <= 1 else max(size, base * decay)
        return [[abs(r - c) <= reach for c in range(frame)] for r in range(frame)]

    def expected(q, k, v):
        pairs = set()
        for i in range(geometry.frames):
            for j in range(geometry.frames):
                mask = pair(abs(i - j), sink and j == 0)
                if mask is None:
                    continue
                touched = {}
                for r in range(frame):
                    for c in range(frame):
                        row, column = i * frame + r, j * frame + c
                        key = (row // size, column // size)
                        counts = touched.setdefault(key, {})
                        counts[column] = counts.get(column, 0) + mask[r][c]
                for key, counts in touched.items():
                    some = [n for n in counts.values() if n]
                    if sum(n > len(blocks[key[0]]) / 3 for n in some) > 0.6 * len(some):
                        pairs.add(key)
        pairs |= {(i, i) for i in range(len(blocks))}
        return expand(blocks, blocks, pairs, geometry.video)

    check_plain(by_name("radial", decay=decay, sink=sink, block=size), geometry, expected)


@pytest.mark.parametrize(
    ("grid", "decay", "density"), [((21, 48, 80), 0.2, 0.261), ((21, 48, 80), 1.0, 0.394)]
)
def test_radial_at_the_size_of_wan(grid, decay, density):
    """Densities that the published generator gives for Wan's 81 frames of 768 x 1280."""
    geometry = Geometry(*grid)
    q = torch.empty(1, 1, geometry.video, 0)
    decision = by_name("radial", decay=decay).plan(q, q, q, geometry, State(), context())
    assert decision.density(geometry).item() == pytest.approx(density, abs=5e-4)


def test_svg1():
    """A head that looks in space and one that looks through time each get their own band."""
    geometry, density, size = Geometry(6, 4, 8), 0.3, 16
    place = torch.tensor(places(geometry)).double()
    waves = 8 * torch.randn(2, 16, dtype=torch.float64)
    # Nearby in frame-major order, and at the same place of the frame through all frames.
    line = place @ torch.tensor([geometry.frame, geometry.width, 1]).double() / geometry.video
    phases = line[:, None] @ (2 * waves[:1]), place[:, 1:] / 6 @ waves
    features = torch.stack([torch.cat((x.cos(), x.sin()), 1) / 4 for x in phases])
    q = k = (6.7 * features).float()[None]
    v = torch.randn(1, 2, geometry.video, q.shape[3])
    planner = by_name("svg1", density=density, block=size, rows=32)
    attended = run(planner, geometry, q, k, v)

    length = geometry.video
    reach = round(length * (1 - math.sqrt(1 - density)) / size)
    sink = -(-geometry.frame // size)
    by_time = [t * geometry.frame + p for p in range(geometry.frame) for t in range(6)]
    orders = [list(range(length)), by_time]
    candidates = []
    for order in orders:
        blocks = [order[i : i + size] for i in range(0, length, size)]
        pairs = {
            (i, j)
            for i in range(len(blocks))
            for j in range(len(blocks))
            if abs(i - j) <= reach or j < sink
        }
        candidates.append(expand(blocks, blocks, pairs, length))
    rows = [(i * length + length // 2) // 32 for i in range(32)]
    exact = dense(q, k, v)
    masks = []
    for h in range(2):
        errors = [
            (masked_attention(q, k, v, mask)[0] - exact)[0, h, rows].square().mean()
            for mask in candidates
        ]
        assert errors.index(min(errors)) == h
        masks.append(candidates[h])
    assert torch.equal(chosen_tokens(attended, q, geometry)[0], torch.stack(masks))
    assert relative(attended.output, masked_attention(q, k, v, torch.stack(masks))[0]) < 1e-6


@pytest.mark.parametrize("rows", [1, 16])
def test_moba(rows):
    chunks, queries = cuts(LINE.video, 16), cuts(LINE.video, rows)
    count = math.ceil(0.25 * len(chunks))

    def expected(q, k, v):
        pairs = set()
        for i, block in enumerate(queries):
            gate = [float(q[block].double().mean(0) @ mean) for mean in means(k, chunks)]
            own = {j for j, chunk in enumerate(chunks) if set(chunk) & set(block)}
            ranked = torch.tensor([math.inf if j in own else g for j, g in enumerate(gate)])
            pairs |= {(i, j) for j in {*largest(ranked, count), *own}}
        return expand(queries, chunks, pairs, LINE.video)

    check_plain(by_name("moba", density=0.25, chunk=16, rows=rows), LINE, expected)


VMOBA_SHAPES = ((1, 5, 8), (4, 3, 2), (2, 3, 4))


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("select", ["count", "head"])
def test_vmoba(select, kind, rows):
    chunks = list(boxes(LINE, VMOBA_SHAPES[kind]).values())
    order = [token for chunk in chunks for token in chunk]
    queries = [order[i : i + rows] for i in range(0, len(order), rows)]
    density = (0.6, 0.3, 0.2)[kind]

    def expected(q, k, v):
        gate = torch.stack(
            [
                torch.stack([q[block].double().mean(0) @ mean for mean in means(k, chunks)])
                for block in queries
            ]
        )
        own = {
            (i, j)
            for i, block in enumerate(queries)
            for j, chunk in enumerate(chunks)
            if set(chunk) & set(block)
        }
        pairs = set(own)
        if select == "count":
            for i in range(len(queries)):
                mine = {j for a, j in own if a == i}
                ranked = torch.tensor(
                    [math.inf if j in mine else float(g) for j, g in enumerate(gate[i])]
                )
                pairs |= {(i, j) for j in largest(ranked, math.ceil(density * len(chunks)))}
            return expand(queries, chunks, pairs, LINE.video)
        shares = (gate - gate.min()) / (gate.max() - gate.min())
        shares = shares / shares.sum()
        held = sum(float(shares[pair]) for pair in own)
        others = sorted(
            ((i, j) for i in range(len(queries)) for j in range(len(chunks)) if (i, j) not in own),
            key=lambda pair: -float(shares[pair]),
        )
        target, reached = max(0.0, 0.4 - held), 0.0
        for n, pair in enumerate(others):
            if n and reached >= target:
                break
            pairs.add(pair)
            reached += float(shares[pair])
        return expand(queries, chunks, pairs, LINE.video)

    planner = by_name(
        "vmoba", select=select, density=(0.6, 0.3, 0.2), share=0.4, frames=1, patch=(3, 2),
        box=(2, 3, 4), rows=rows,
    )  # fmt: skip
    check_plain(planner, LINE, expected, layer=3 + kind)


@pytest.mark.parametrize("segment", [0, 64])
def test_pbs_attn(segment):
    size, probes = 16, 24
    queries = cuts(LINE.video, size)
    rows = [(i * LINE.video + LINE.video // 2) // probes for i in range(probes)]

    def expected(q, k, v):
        logits = q[rows].double() @ k.double().T / math.sqrt(q.shape[-1])
        importance = logits.softmax(-1).mean(0).tolist()
        order = []
        for part in cuts(LINE.video, segment or LINE.video):
            order += sorted(part, key=lambda j: (-importance[j], j))
        keys = [order[i : i + size] for i in range(0, len(order), size)]
        pairs = set()
        for i, row in enumerate(pooled(q, k, queries, keys)):
            here = segment and i * size // segment
            own = [j for j in range(len(keys)) if segment and j * size // segment == here]
            others = row.clone()
            others[own] = 0.0
            pairs |= {(i, j) for j in {*fewest(others, 0.5), *own, 0}}
        return expand(queries, keys, pairs, LINE.video)

    planner = by_name("pbs_attn", tau=0.5, segment=segment, probes=probes, block=size)
    check_plain(planner, LINE, expected)


def test_proxy_attn():
    """Three heads in groups of two: the last group has one."""
    q, k, v = tokens(LINE, heads=3)
    blocks = cuts(LINE.video, 16)
    planner = by_name("proxy_attn", tau=0.5, heads=2, stride=4, block=16)
    attended = run(planner, LINE, q, k, v)
    masks = []
    for h, group in enumerate([[0, 1], [0, 1], [2]]):
        ranking = antidiagonals(q[0, group].mean(0), k[0, group].mean(0), 4, 16)
        needed = [len(fewest(row, 0.5)) for row in pooled(q[0, h], k[0, h], blocks)]
        count = math.ceil(sum(needed) / len(needed))
        pairs = {(i, j) for i, row in enumerate(ranking) for j in largest(row, count)}
        masks.append(expand(blocks, blocks, pairs, LINE.video))
    assert torch.equal(chosen_tokens(attended, q, LINE)[0], torch.stack(masks))
    assert relative(attended.output, masked_attention(q, k, v, torch.stack(masks))[0]) < 1e-6


@pytest.mark.parametrize("geometry", [ODD, Geometry(4, 8, 8)])
@pytest.mark.parametrize("centroids", [True, False])
def test_cubes(geometry, centroids):
    cube, density = (2, 4, 2), 0.3
    q, k, v = tokens(geometry)
    blocks = list(boxes(geometry, cube).values())
    attended = run(
        by_name("cubes", density=density, cube=cube, centroids=centroids), geometry, q, k, v
    )
    rows = [pooled(q[0, h], k[0, h], blocks) for h in range(2)]
    # Every block's place in the one ranking by how much mass stands before it in its row.
    before = []
    for head in rows:
        for row in head:
            held = 0.0
            for j in largest(row, len(row)):
                before.append(held)
                held += float(row[j])
    before.sort()
    kept = int(density * len(before))
    tau = (before[kept - 1] + before[kept]) / 2
    masks = []
    for head in rows:
        pairs = {(i, j) for i, row in enumerate(head) for j in fewest(row, tau)}
        masks.append(expand(blocks, blocks, pairs, geometry.video))
    assert torch.equal(chosen_tokens(attended, q, geometry)[0], torch.stack(masks))
    if centroids:
        exact = with_stand_ins(q, k, v, masks, [blocks] * 2)
    else:
        exact = masked_attention(q, k, v, torch.stack(masks))[0]
    assert relative(attended.output, exact) < 1e-6


def lloyd(x, clusters, iterations):
    """k-means in loops: nearest centroid, then means; an empty cluster stays where it is."""
    centroids = [c.double() for c in clusters]
    for _ in range(iterations):
        members = [[] for _ in centroids]
        for i, row in enumerate(x.double()):
            away = [float((row - centroid).norm()) for centroid in centroids]
            members[away.index(min(away))].append(i)
        centroids = [
            x[m].double().mean(0) if m else c for m, c in zip(members, centroids, strict=True)
        ]
    return members, centroids


def evenly(x, count):
    return [x[i * len(x) // count] for i in range(count)]


def cluster_scores(q_means, k_means, members, scale):
    return [
        softmax(
            [
                float(a @ b) * scale + (math.log(len(m)) if m else -math.inf)
                for b, m in zip(k_means, members, strict=True)
            ]
        )
        for a in q_means
    ]


def test_svg2():
    """Two steps: 3 iterations from evenly spaced tokens, then 1 from where the first ended."""
    geometry = Geometry(4, 6, 8)
    planner = by_name(
        "svg2", tau=0.5, min_ratio=0.2, query_clusters=5, key_clusters=8, first=3, again=1
    )
    state, carried = State(), {}
    for step in (5, 6):
        q, k, v = tokens(geometry, seed=step)
        attended = run(planner, geometry, q, k, v, state, context(step))
        masks = []
        for h in range(2):
            start = carried.get(h, (evenly(q[0, h], 5), evenly(k[0, h], 8)))
            iterations = 1 if h in carried else 3
            (rows, q_means), (columns, k_means) = (
                lloyd(x[0, h], c, iterations) for x, c in zip((q, k), start, strict=True)
            )
            carried[h] = q_means, k_means
            scores = cluster_scores(q_means, k_means, columns, 1 / math.sqrt(q.shape[3]))
            pairs = set()
            for i, row in enumerate(scores):
                kept = fewest(row, 0.5)
                kept = kept if len(kept) >= 2 else largest(row, 2)
                pairs |= {(i, j) for j in kept}
            masks.append(expand(rows, columns, pairs, geometry.video))
        assert torch.equal(chosen_tokens(attended, q, geometry)[0], torch.stack(masks))
        exact = masked_attention(q, k, v, torch.stack(masks))[0]
        assert relative(attended.output, exact) < 1e-6


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_svg_ear(gamma):
    geometry = Geometry(4, 6, 8)
    q, k, v = tokens(geometry)
    scale = 1 / math.sqrt(q.shape[3])
    planner = by_name(
        "svg_ear", tau=0.6, min_ratio=0.1, query_clusters=5, key_clusters=10, first=4, gamma=gamma
    )
    attended = run(planner, geometry, q, k, v)
    masks, blocks = [], []
    for h in range(2):
        rows, q_means = lloyd(q[0, h], evenly(q[0, h], 5), 4)
        columns, k_means = lloyd(k[0, h], evenly(k[0, h], 10), 4)
        scores = cluster_scores(q_means, k_means, columns, scale)
        sizes = [len(column) for column in columns]
        assert min(sizes) > 0
        pairs = set()
        for i, row in enumerate(scores):
            by_mass = fewest(row, 0.6)
            by_mass = by_mass if len(by_mass) >= 2 else largest(row, 2)
            reserve = largest(row, 1)
            budget = sum(sizes[j] for j in by_mass) - sum(sizes[j] for j in reserve)
            worth = {}
            for j, column in enumerate(columns):
                mean = v[0, h][column].double().mean(0)
                error = 0.0
                for t in column:
                    weight = math.exp(float(q_means[i] @ k[0, h, t].double()) * scale)
                    stand_in = math.exp(float(q_means[i] @ k_means[j]) * scale)
                    error += float((weight * v[0, h, t].double() - stand_in * mean).square().sum())
                worth[j] = math.log(error) - gamma * math.log(len(rows[i]) * sizes[j])
            kept, spent = set(reserve), 0
            for j in sorted(set(worth) - kept, key=lambda j: -worth[j]):
                if spent >= budget:
                    break
                kept.add(j)
                spent += sizes[j]
            pairs |= {(i, j) for j in kept}
        masks.append(expand(rows, columns, pairs, geometry.video))
        blocks.append(columns)
    assert torch.equal(chosen_tokens(attended, q, geometry)[0], torch.stack(masks))
    exact = with_stand_ins(q, k, v, masks, blocks)
    assert relative(attended.output, exact) < 1e-6


@pytest.mark.parametrize(("adaptive", "row_step"), [(False, 1), (True, 1), (False, 4)])
def test_adaspa(adaptive, row_step):
    """A first search at step 2, the same mask at 3, and at 6 a search with step 2's LSE."""
    geometry, size, density = Geometry(4, 6, 8), 16, 0.3
    blocks = cuts(geometry.video, size)
    n = len(blocks)
    settings = dict(density=density, block=size, adaptive=adaptive, recall=0.62)
    planner = by_name("adaspa", row_step=row_step, **settings)
    state = State()
    lse = masks = None
    # Two sharp heads, one soft one, one in between.
    sharp = torch.tensor([1.6, 0.2, 1.0, 1.8])[None, :, None, None]
    for step in (2, 3, 6):
        q, k, v = tokens(geometry, heads=4, seed=step)
        q = q * sharp
        attended = run(planner, geometry, q, k, v, state, context(step))
        everything = torch.ones(geometry.video, geometry.video, dtype=torch.bool)
        if step == 2:
            lse = masked_attention(q, k, v, everything)[1]
        if step != 3:
            logits = q.double() @ k.double().mT / math.sqrt(q.shape[3])
            weights = (logits - lse[..., None]).exp()[0]
            mass = torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack([head[r[::row_step]][:, c].sum() for c in blocks])
                            for r in blocks
                        ]
                    )
                    for head in weights
                ]
            )
            counts = [math.ceil(density * n)] * 4
            if adaptive:
                kept = [
                    sum(float(row[j]) for row in head for j in largest(row, counts[0]))
                    / float(head.sum())
                    for head in mass
                ]
                easy = min(2, sum(share > 0.62 for share in kept))
                assert easy > 0
                ranked = sorted(range(4), key=lambda h: -kept[h])
                for h in ranked[:easy]:
                    counts[h] = math.ceil(density / 2 * n)
                for h in ranked[4 - easy :]:
                    counts[h] = math.ceil(1.5 * density * n)
            masks = torch.stack(
                [
                    expand(
                        blocks, blocks,
                        {(i, j) for i, row in enumerate(head) for j in largest(row, count)},
                        geometry.video,
                    )
                    for head, count in zip(mass, counts, strict=True)
                ]
            )  # fmt: skip
        if step == 2:
            assert attended.decision.is_dense and attended.decision.reason == "first search"
            assert relative(attended.output, dense(q, k, v)) < 1e-6
        else:
            assert torch.equal(chosen_tokens(attended, q, geometry)[0], masks)
            assert relative(attended.output, masked_attention(q, k, v, masks)[0]) < 1e-6


def frame_band(geometry, density, size):
    """Blocks of each frame that hold a pair of tokens within the band, for all pairs of frames."""
    frame, reach = geometry.frame, int(geometry.frame * density) // 2
    blocks, within = [], []
    for t in range(geometry.frames):
        for cut in cuts(frame, size):
            within.append(cut)
            blocks.append([t * frame + p for p in cut])
    pairs = {
        (i, j)
        for i, a in enumerate(within)
        for j, b in enumerate(within)
        if any(abs(x - y) <= reach for x in a for y in b)
    }
    return expand(blocks, blocks, pairs, geometry.video)


@pytest.mark.parametrize("geometry", [Geometry(3, 5, 7), Geometry(3, 6, 8)])
def test_rettention(geometry):
    """With full matrices: rho and the residual of steps 2 and 5, used and drifting in between."""
    mask = frame_band(geometry, 0.2, 16)
    planner = by_name("rettention", kept=FrameBand(density=0.2, block=16), every=3, drift=0.3)
    state, rho, residual = State(), None, None
    for step in range(2, 7):
        q, k, v = tokens(geometry, seed=step)
        attended = run(planner, geometry, q, k, v, state, context(step))
        logits = q.double() @ k.double().mT / math.sqrt(q.shape[3])
        kept, _ = masked_attention(q, k, v, mask)
        if step in (2, 5):
            everything = logits.exp().sum(-1)
            rho = ((logits.exp() * mask).sum(-1) / everything)[..., None]
            full = dense(q, k, v)
            residual = full - rho * kept
            assert relative(attended.output, full) < 1e-6
            assert attended.decision.density(geometry).item() == 1.0
        else:
            assert relative(attended.output, rho * kept + residual) < 1e-6
            rho = (rho + 0.3).clamp(max=1.0)
            assert torch.equal(chosen_tokens(attended, q, geometry)[0, 0], mask)


def test_flash_block():
    """The rest of steps 2 and 5 merged with the fresh softmax over the blocks chosen then."""
    geometry = Geometry(4, 6, 8)
    inner = by_name("moba", density=0.3, chunk=16, rows=16)
    planner = by_name("flash_block", kept=inner, every=3)
    state = State()
    for step in range(2, 7):
        q, k, v = tokens(geometry, seed=step)
        attended = run(planner, geometry, q, k, v, state, context(step))
        if step in (2, 5):
            mask = chosen_tokens(run(inner, geometry, q, k, v), q, geometry)
            outside, outside_lse = masked_attention(q, k, v, ~mask)
            assert relative(attended.output, dense(q, k, v)) < 1e-6
        inside, inside_lse = masked_attention(q, k, v, mask)
        total = torch.logaddexp(inside_lse, outside_lse)
        exact = (inside_lse - total).exp()[..., None] * inside
        exact += (outside_lse - total).exp()[..., None] * outside
        assert relative(attended.output, exact) < 1e-6
        assert torch.equal(chosen_tokens(attended, q, geometry), mask)
