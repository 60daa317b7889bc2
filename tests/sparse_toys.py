"""What the planners' tests share: small inputs, runs through `attend`, answers by plain loops."""

import math

import torch
from torch import Tensor

from blockcache.kernels.sparse_attention.reference import token_mask
from blockcache.plan import even_steps
from blockcache.plan.geometry import Geometry
from blockcache.sparse import Attended, Context, Planner, State, attend, by_name
from blockcache.sparse.rettention import FrameBand

# Lower than real ones, so that a few tokens hold most of the mass.
HEAD_DIM = 8

SMALL = {
    "adaspa": {"block": 16},
    "cubes": {"cube": (2, 4, 4)},
    "flash_block": {"kept": by_name("cubes", cube=(2, 4, 4), centroids=False)},
    "moba": {"chunk": 16, "rows": 16},
    "nabla": {"tau": 0.5, "patch": 4},
    "pbs_attn": {"tau": 0.5, "block": 16, "segment": 64},
    "proxy_attn": {"tau": 0.5, "block": 16, "heads": 2},
    "radial": {"block": 16, "decay": 0.5},
    "rettention": {"kept": FrameBand(density=0.2, block=16)},
    "sparge": {"block_q": 16, "block_k": 16, "amount": 0.3},
    "sta": {"tile": (2, 4, 4), "sides": (1, 1, 3)},
    "svg1": {"block": 16, "rows": 16},
    "svg2": {"tau": 0.5, "query_clusters": 6, "key_clusters": 10, "first": 3},
    "svg_ear": {"tau": 0.5, "query_clusters": 6, "key_clusters": 10, "first": 3},
    "vmoba": {"rows": 16, "box": (2, 4, 4)},
    "xattention": {"tau": 0.5, "stride": 4, "block": 16},
}


def context(step: int = 5, total: int = 10, **settings: object) -> Context:
    """A context at step `step` of `total`."""
    return Context(even_steps(total)[step], **settings)


def tokens(
    geometry: Geometry, heads: int = 2, batch: int = 1, seed: int = 0, head_dim: int = HEAD_DIM
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v `[B, H, S, D]`; neighbouring tokens are alike, so that blocks differ."""
    noise = torch.Generator().manual_seed(seed)

    def one(size: float) -> Tensor:
        x = torch.randn(batch, heads, geometry.tokens, head_dim, generator=noise)
        smooth = torch.nn.functional.avg_pool1d(x.flatten(0, 1).mT, 9, 1, 4).mT.view_as(x)
        return size * (3 * smooth + 0.5 * x)

    return one(1.6), one(1.6), one(1.0)


def run(
    planner: Planner, geometry: Geometry, q: Tensor, k: Tensor, v: Tensor,
    state: State | None = None, at: Context | None = None,
) -> Attended:  # fmt: skip
    """`attend` with a fresh state in the middle of a run."""
    return attend(planner, q, k, v, geometry, state or State(), at or context())


def chosen_tokens(attended: Attended, q: Tensor, geometry: Geometry) -> Tensor:
    """Which video keys each video query attends, bool `[B, H, Sv, Sv]`."""
    plan = attended.decision.plan
    assert plan is not None, attended.decision.reason
    return token_mask(plan, q.shape[0], q.shape[1], geometry.video, geometry.video)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, every pair written out.

    extra: added to the logits.
    """
    logits = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    if extra is not None:
        logits = logits + extra
    logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v.double(), logits.logsumexp(-1)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention in float64."""
    return masked_attention(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))[0]


def fewest(row: Tensor, tau: float) -> list[int]:
    """Rule A by its words: the largest first, until they hold `tau` of the row."""
    values = row.double().tolist()
    order = sorted(range(len(values)), key=lambda j: (-values[j], j))
    kept, held = [], 0.0
    for j in order:
        if held >= tau * sum(values):
            break
        kept.append(j)
        held += values[j]
    return kept


def largest(row: Tensor, count: int) -> list[int]:
    """Rule C by its words."""
    values = row.double().tolist()
    return sorted(range(len(values)), key=lambda j: (-values[j], j))[:count]


def softmax(row: list[float]) -> Tensor:
    """Softmax in float64."""
    return torch.tensor(row, dtype=torch.float64).softmax(0)


def places(geometry: Geometry) -> list[tuple[int, int, int]]:
    """Frame, row and column of every video token."""
    return [
        (t, h, w)
        for t in range(geometry.frames)
        for h in range(geometry.height)
        for w in range(geometry.width)
    ]


def boxes(geometry: Geometry, shape: tuple[int, int, int]) -> dict[tuple[int, ...], list[int]]:
    """Tokens of each box of `shape`, by the box's place among the boxes, in raster order."""
    found: dict[tuple[int, ...], list[int]] = {}
    for token, place in enumerate(places(geometry)):
        found.setdefault(tuple(p // s for p, s in zip(place, shape, strict=True)), []).append(token)
    return dict(sorted(found.items()))


def cuts(length: int, size: int) -> list[list[int]]:
    """Tokens of each block of a line."""
    return [list(range(i, min(i + size, length))) for i in range(0, length, size)]


def expand(
    blocks_q: list[list[int]], blocks_k: list[list[int]], pairs: set[tuple[int, int]], length: int
) -> Tensor:
    """Token mask `[S, S]` of block pairs (query block, key block)."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i, j in pairs:
        for row in blocks_q[i]:
            mask[row, blocks_k[j]] = True
    return mask


def relative(result: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact values; inf for NaN."""
    if result.shape != exact.shape or not torch.isfinite(result).all():
        return math.inf
    return ((result.double() - exact.double()).norm() / exact.double().norm()).item()


def means(x: Tensor, blocks: list[list[int]]) -> list[Tensor]:
    """Mean row of each block, in float64."""
    return [x[block].double().mean(0) for block in blocks]


def with_stand_ins(
    q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], blocks: list[list[list[int]]]
) -> Tensor:
    """Softmax over the chosen tokens and one key for each block of a row that was not chosen."""
    outputs = []
    for h in range(q.shape[1]):
        keys = torch.stack(means(k[0, h], blocks[h]))
        values = torch.stack(means(v[0, h], blocks[h]))
        bias = torch.tensor([math.log(len(block)) for block in blocks[h]], dtype=torch.float64)
        left_out = ~torch.stack([masks[h][:, block[0]] for block in blocks[h]], 1)
        output, _ = masked_attention(
            q[0, h], torch.cat((k[0, h].double(), keys)), torch.cat((v[0, h].double(), values)),
            torch.cat((masks[h], left_out), 1),
            torch.cat((torch.zeros(len(k[0, h]), dtype=torch.float64), bias)),
        )  # fmt: skip
        outputs.append(output)
    return torch.stack(outputs)[None]


def small(name: str, **changes: object) -> Planner:
    """Planner `name` with blocks for a few hundred tokens."""
    return by_name(name, **{**SMALL[name], **changes})
