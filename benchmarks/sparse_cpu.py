"""Sparse against dense attention on this CPU, side by side in one process.

`python -m benchmarks.sparse_cpu --json FILE` prints, for every length and density, median seconds
of both and their ratio. Runs are interleaved, so that a busy machine slows both.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from click import echo

from blockcache.kernels.sparse_attention import SparsePlan, sparse_attention

BLOCK_Q, BLOCK_K = 128, 64


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kind", choices=("equal", "unequal"), default="equal")
    parser.add_argument("--block-q", type=int, default=BLOCK_Q)
    args = parser.parse_args()
    rows = []
    echo(f"{'S':>6} {'density':>8} {'dense s':>9} {'sparse s':>9} {'ratio':>6} {'ideal':>6}")
    with torch.inference_mode():
        for length in args.lengths:
            for density in args.densities:
                row = measure(length, density, args)
                rows.append(row)
                echo(
                    f"{row['S']:6d} {row['density']:8.3f} {row['dense_s']:9.4f} "
                    f"{row['sparse_s']:9.4f} {row['ratio']:6.2f} {1 / row['density']:6.2f}"
                )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def measure(length: int, density: float, args: argparse.Namespace) -> dict[str, float | int | str]:
    """One row: medians over interleaved repeats, after a check that both compute the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, args.heads, args.head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = random_mask(args.heads, length, density, args.kind, args.block_q, generator)
    plan = SparsePlan.from_mask(mask, args.block_q, BLOCK_K)
    check(q, k, v, plan)

    def dense() -> object:
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))

    def sparse() -> object:
        return sparse_attention(q, k, v, plan)

    timings: dict[Callable[[], object], list[float]] = {dense: [], sparse: []}
    for repeat in range(args.repeats + 1):
        for run, seconds in timings.items():
            start = time.perf_counter()
            run()
            # The first round warms up.
            if repeat:
                seconds.append(time.perf_counter() - start)
    dense_s, sparse_s = (statistics.median(seconds) for seconds in timings.values())
    return {
        "S": length, "H": args.heads, "D": args.head_dim, "dtype": "float32", "kind": args.kind,
        "block_q": args.block_q, "block_k": BLOCK_K, "repeats": args.repeats,
        "density": plan.density(length, length).mean().item(),
        "dense_s": dense_s, "sparse_s": sparse_s, "ratio": dense_s / sparse_s,
        "ratio_worst": min(d / s for d, s in zip(*timings.values(), strict=True)),
        "ratio_best": max(d / s for d, s in zip(*timings.values(), strict=True)),
    }  # fmt: skip


def random_mask(
    heads: int, length: int, density: float, kind: str, block_q: int, generator: torch.Generator
) -> torch.Tensor:
    """Random key blocks; equally many per row, or from a third to five thirds of that."""
    rows, columns = -(-length // block_q), -(-length // BLOCK_K)
    rank = torch.rand(1, heads, rows, columns, generator=generator).argsort(-1).argsort(-1)
    count = torch.full((1, heads, rows, 1), round(density * columns))
    if kind == "unequal":
        spread = 1 / 3 + 4 / 3 * torch.rand(count.shape, generator=generator)
        count = (count * spread).round().clamp(1, columns)
    return rank < count


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SparsePlan) -> None:
    """Compare head 0, query block 0 with attention written out; a wrong result is not timed."""
    rows = slice(0, plan.q_blocks)
    tokens = plan.mask()[0, 0, 0].repeat_interleave(BLOCK_K)[: k.shape[1]]
    head = [t[0, :, 0].double() for t in (q, k, v)]
    weights = (head[0][rows] @ head[1][tokens].T * q.shape[3] ** -0.5).softmax(-1)
    error = (sparse_attention(q, k, v, plan)[0, rows, 0] - weights @ head[2][tokens]).abs().max()
    if not error < 1e-5:
        raise SystemExit(f"sparse attention is wrong by {error:.2e}; nothing was timed.")


def machine() -> dict[str, str | int]:
    """What the numbers depend on."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
