"""What sparse methods are made of and what they keep: `python -m benchmarks.sparse_table`.

The first table comes from the planners' own cards. The second is measured on structured synthetic
queries and keys, with heads that look nearby, inside their frame, along time, at a few sinks, and
at tokens of their own kind. `--write` puts both into docs/sparse.md.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from blockcache.kernels.sparse_attention import SparsePlan
from blockcache.kernels.sparse_attention.reference import block_of_token
from blockcache.plan import even_steps
from blockcache.plan.geometry import Geometry
from blockcache.sparse import Context, Planner, State, attend, by_name, names
from blockcache.sparse.rettention import FrameBand
from blockcache.sparse.table import methods_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "sparse.md"
GRID = Geometry(8, 16, 16)
HEADS = ("local", "local", "frame", "frame", "time", "time", "sinks", "kinds")


@functools.lru_cache(maxsize=8)
def structured(
    geometry: Geometry, heads: tuple[str, ...] = HEADS, head_dim: int = 64, seed: int = 0,
    sharpness: float = 8.0, drift: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values `[1, H, S, D]` whose attention has a known kind of structure.

    A head's logits are `sharpness` times a bump in the distance of two tokens, widened along the
    axes the head does not care about, plus noise. "sinks" adds a few keys that everyone likes,
    "kinds" likes tokens of the same one of 24 kinds that lie in irregular patches.

    drift: moves queries and keys by that share of their own size, as one sampler step does.
    """
    noise = torch.Generator().manual_seed(seed)
    axes = [torch.arange(n) / n for n in geometry.grid]
    place = torch.cartesian_prod(*axes)
    reach = {
        "local": (0.2, 0.12, 0.12), "frame": (0.05, 0.5, 0.5), "time": (9.0, 0.06, 0.06),
        "sinks": (0.4, 0.3, 0.3), "kinds": (9.0, 9.0, 9.0),
    }  # fmt: skip
    q, k = [], []
    for head in heads:
        features = _bumps(place, reach[head], head_dim, noise)
        if head == "kinds":
            seeds = place[torch.randperm(len(place), generator=noise)[:96]]
            kind = torch.cdist(place, seeds).argmin(1) % 24
            features = torch.nn.functional.normalize(
                torch.randn(24, head_dim, generator=noise), dim=1
            )[kind]
        keys = features.clone()
        if head == "sinks":
            chosen = torch.randperm(len(place), generator=noise)[:12]
            keys[chosen] = 1.3 * torch.nn.functional.normalize(features.mean(0), dim=0)
        q.append(features)
        k.append(keys)
    size = (sharpness * math.sqrt(head_dim)) ** 0.5
    made = []
    for x in (torch.stack(q), torch.stack(k)):
        noisy = x * size + 0.35 * torch.randn(x.shape, generator=noise)
        moved = noisy + drift * noisy.std() * torch.randn(
            x.shape, generator=torch.Generator().manual_seed(seed + 1)
        )
        made.append(moved[None])
    # Values vary smoothly over the video, as features do, and from token to token.
    smooth = torch.stack([_bumps(place, (0.5, 0.3, 0.3), head_dim, noise) for _ in heads])
    value = 4 * smooth + 0.5 * torch.randn(smooth.shape, generator=noise)
    return made[0], made[1], value[None]


def _bumps(place: Tensor, reach: tuple[float, ...], size: int, noise: torch.Generator) -> Tensor:
    """Unit vectors whose product falls off like a Gaussian of the distance (random features)."""
    waves = torch.randn(3, size // 2, generator=noise) / torch.tensor(reach)[:, None]
    phase = place @ waves
    return torch.cat((phase.cos(), phase.sin()), 1) / math.sqrt(size // 2)


class Kept(NamedTuple):
    """What a plan keeps of the attention mass, and the most that as many blocks could keep."""

    density: float
    recall: float
    best: float
    error: float


def block_masses(plan: SparsePlan, q: Tensor, k: Tensor) -> Tensor:
    """Exact mass of every block of a plan, `[B, H, nQ, nK]`, every pair written out."""
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[3])).softmax(-1)
    batch, heads, length = q.shape[:3]
    q_block, k_block = (
        block_of_token(blocks, order, length, count).expand(batch, heads, -1)
        for blocks, order, count in (
            (plan.q_blocks, plan.q_order, plan.num_q_blocks),
            (plan.k_blocks, plan.k_order, plan.num_k_blocks),
        )
    )
    by_key = weights.new_zeros(batch, heads, length, plan.num_k_blocks)
    by_key.scatter_add_(3, k_block[:, :, None].expand(-1, -1, length, -1), weights)
    mass = weights.new_zeros(batch, heads, plan.num_q_blocks, plan.num_k_blocks)
    return mass.scatter_add_(2, q_block[..., None].expand_as(by_key), by_key)


def measure(planner: Planner, geometry: Geometry, calls: int = 2, drift: float = 0.1) -> Kept:
    """Density, recall and error of a planner's last of `calls` steps, each moved by `drift`."""
    state, steps = State(), even_steps(10)
    for call in range(calls):
        q, k, v = structured(geometry, drift=call * drift)
        with torch.no_grad():
            # In layer 2 VMoBA's chunks lie in space and time.
            at = Context(steps[2 + call], layer=2, layers=3)
            output, decision = attend(planner, q, k, v, geometry, state, at)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    if output is None or decision.plan is None:
        return Kept(1.0, 1.0, 1.0, 0.0)
    error = ((output - dense).norm() / dense.norm()).item()
    mass = block_masses(decision.plan, q, k)
    mask = decision.plan.mask().expand_as(mass)
    counts = mask.sum(-1, keepdim=True)
    ranked = mass.sort(-1, descending=True).values
    best = ranked.masked_fill(torch.arange(mass.shape[3]) >= counts, 0.0).sum() / mass.sum()
    recall = (mass * mask).sum() / mass.sum()
    density = decision.density(geometry).mean()
    return Kept(density.item(), recall.item(), best.item(), error)


KNOBS = {
    "adaspa": "density", "cubes": "density", "flash_block": "", "moba": "density", "nabla": "tau",
    "pbs_attn": "tau", "proxy_attn": "tau", "radial": "decay", "rettention": "", "sparge": "amount",
    "sta": "", "svg1": "density", "svg2": "tau", "svg_ear": "tau", "vmoba": "", "xattention": "tau",
}  # fmt: skip
SMALL = {
    "sta": {"tile": (2, 4, 8), "sides": (1, 3, 3)}, "svg2": {"key_clusters": 64},
    "svg_ear": {"key_clusters": 64}, "xattention": {"block": 64}, "radial": {"block": 64},
    "pbs_attn": {"block": 64}, "proxy_attn": {"block": 64, "heads": 2}, "svg1": {"block": 64},
    "sparge": {"block_q": 64}, "vmoba": {"density": (0.25, 0.25, 0.25), "box": (4, 4, 4)},
    "rettention": {"kept": FrameBand(block=16)},
}  # fmt: skip
"""Settings for a video of 2,048 tokens, in blocks of 64 wherever a method leaves the choice."""


def at_density(name: str, geometry: Geometry, density: float) -> Planner:
    """Planner `name` with its knob turned until it keeps about `density`; some have no knob."""
    knob, settings = KNOBS[name], SMALL.get(name, {})
    low, high = 0.01, 1.0
    while knob and high - low > 0.02:
        middle = (low + high) / 2
        found = measure(by_name(name, **settings, **{knob: middle}), geometry)
        low, high = (middle, high) if found.density < density else (low, middle)
    return by_name(name, **settings, **({knob: low} if knob else {}))


def recall_table(geometry: Geometry = GRID, density: float = 0.25) -> str:
    """Markdown: what every planner keeps at about the same density."""
    head = ("planner", "density", "recall", "best", "error")
    rows = [head, ("---",) * len(head)]
    for name in names():
        kept = measure(at_density(name, geometry, density), geometry)
        rows.append((f"`{name}`", *(f"{number:.3f}" for number in kept)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def filled(text: str, name: str, table: str) -> str:
    """The text with what lies between the marks of `name` replaced by the table."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end)[1]


@click.command()
@click.option("--write", is_flag=True, help="Put the tables into docs/sparse.md.")
def main(write: bool) -> None:
    """Print or write the tables."""
    torch.set_num_threads(1)
    tables = {"methods": methods_table(), "recall": recall_table()}
    if not write:
        click.echo("\n".join(tables.values()))
        return
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        page = filled(page, name, table)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
