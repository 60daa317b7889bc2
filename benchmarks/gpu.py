"""Check the attention kernels on this GPU against float64, then measure them.

`python -m benchmarks.gpu` is the whole command. It checks a sample of every form first and
measures nothing that is wrong; it then times dense and sparse attention beside the backends that
are installed, their planning parts, `linear_combine` and the change statistic, with a flushed and
with a warm L2 cache, and whole denoisers of real size (`gpu_models.py`, where diffusers is
installed), and writes `benchmarks/results/gpu-<name>.json`. `--quick` takes one length.
"""

import argparse
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from click import echo
from torch import Tensor

from benchmarks import gpu_models
from blockcache.kernels.block_scores import (
    antidiagonal_scores,
    block_mass,
    centroid_scores,
    mean_pool,
)
from blockcache.kernels.dense_attention import dense_attention
from blockcache.kernels.linear_combine import linear_combine, relative_change
from blockcache.kernels.select import Count, MassKept, select_blocks
from blockcache.kernels.sparse_attention import (
    Centroids,
    SparsePlan,
    is_supported,
    sparse_attention,
)
from blockcache.kernels.sparse_attention.on_request import ON_REQUEST

RESULTS = Path(__file__).resolve().parent / "results"
LENGTHS = (8192, 16384, 32768, 75600, 119056)
DENSITIES = (1.0, 0.5, 0.25, 0.15, 0.1, 0.05)
# Smallest efficiency, density x dense time / sparse time, that may ship at D=128 from 32k tokens
# on.
TARGETS = {0.5: 0.93, 0.25: 0.90, 0.15: 0.87, 0.1: 0.83, 0.05: 0.72}
MANY_HEADS, MANY_HEADS_LENGTH = 40, 75600
BLOCK_Q, BLOCK_K = 128, 64
LEAST_OF_COPY = 0.85
"""Of measured copy bandwidth: what `linear_combine` and the change statistic should reach."""
L2_BYTES = 256 << 20


def main() -> None:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one length, two densities, fewer repeats"
    )
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="where to write instead of benchmarks/results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA device and found none; nothing was measured.")
    lengths, densities = (LENGTHS, DENSITIES)
    if args.quick:
        lengths, densities, args.repeats = (16384,), (1.0, 0.25), 10
    with torch.inference_mode():
        checks = [check(*case) for case in check_cases()]
        wrong = [row for row in checks if not row["ok"]]
        if wrong:
            raise SystemExit(
                f"{len(wrong)} of {len(checks)} checks failed, nothing was measured: {wrong}"
            )
        echo(f"{len(checks)} checks against float64 passed")
        rows = []
        for length, head_dim in itertools.product(lengths, (128, 64)):
            rows += attention_rows(length, head_dim, densities, args)
            rows += planning_rows(length, head_dim, rows[-1]["best_dense_ms"], args)
        if not args.quick:
            many = argparse.Namespace(**vars(args) | {"heads": MANY_HEADS})
            rows += attention_rows(MANY_HEADS_LENGTH, 128, (0.25, 0.1), many)
        rows += combine_rows(args)
        rows += change_rows(args)
        if importlib.util.find_spec("diffusers"):
            rows += gpu_models.rows(3)
        else:
            echo("diffusers is not installed; no denoiser was measured")
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = args.out or RESULTS / f"gpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": machine(), "checks": checks, "rows": rows}, indent=1) + "\n"
    )
    echo(f"wrote {path}")


def check_cases() -> list[tuple[torch.dtype, int, str]]:
    """Every dtype with every form, and every head dimension in bf16."""
    forms = ("fixed", "ragged", "gather", "extras", "dense")
    cases = list(itertools.product((torch.bfloat16, torch.float16, torch.float32), (128,), forms))
    return cases + list(itertools.product((torch.bfloat16,), (64, 72, 80, 96, 112), forms))


def check(dtype: torch.dtype, head_dim: int, form: str) -> dict[str, Any]:
    """One form at 1000 tokens against float64; allowed is twice what torch itself is off by."""
    torch.manual_seed(0)
    batch, heads, length = 1, 2, 1000
    q, k, v = (
        torch.randn(batch, length, heads, head_dim, device="cuda").to(dtype) for _ in range(3)
    )
    plan = example_plan(form, heads, length)
    options: dict[str, Any] = {}
    if form == "extras":
        shape = (batch, heads, plan.num_k_blocks, head_dim)
        means = [torch.randn(shape, device="cuda").to(dtype) for _ in range(2)]
        options["centroids"] = Centroids(*means, torch.ones(1, 1, plan.num_k_blocks, device="cuda"))
        options["initial"] = (torch.randn_like(q), torch.randn(batch, heads, length, device="cuda"))
    # The torch path in float64 and in the same precision are what the kernel is held against.
    wide = {key: _as(value, torch.float64) for key, value in options.items()}
    if form == "dense":
        result = dense_attention(q, k, v, backend="triton")
        exact = dense_attention(*(t.double() for t in (q, k, v)), backend="torch")
        own = dense_attention(q, k, v, backend="torch")
    else:
        result = sparse_attention(q, k, v, plan, backend="triton", **options)
        exact = sparse_attention(*(t.double() for t in (q, k, v)), plan, backend="torch", **wide)
        own = sparse_attention(q, k, v, plan, backend="torch", **options)
    error, allowed = _rms(result, exact), max(2 * _rms(own, exact), 2e-6)
    row = {"dtype": str(dtype), "D": head_dim, "form": form, "error": error, "allowed": allowed}
    return row | {"ok": error <= allowed}


def example_plan(form: str, heads: int, length: int) -> SparsePlan:
    """A random plan in the given form."""
    q_blocks: int | Tensor = BLOCK_Q
    k_blocks: int | Tensor = BLOCK_K
    rows, columns = -(-length // BLOCK_Q), -(-length // BLOCK_K)
    orders: list[Tensor | None] = [None, None]
    if form in ("ragged", "gather"):
        rows, columns = 6, 13
        q_blocks, k_blocks = (_offsets(heads, length, n) for n in (rows, columns))
    if form == "gather":
        orders = [torch.rand(1, heads, length, device="cuda").argsort(-1) for _ in range(2)]
    mask = torch.rand(1, heads, rows, columns, device="cuda") < 0.4
    return SparsePlan.from_mask(mask, q_blocks, k_blocks, *orders)


def attention_rows(
    length: int, head_dim: int, densities: tuple[float, ...], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Dense by torch and by our loop, then sparse at each density, for random and banded masks."""
    shape = (1, length, args.heads, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    dense = {"own": timed(lambda: dense_attention(q, k, v, backend="triton"), args.repeats)}
    for backend in (
        torch.nn.attention.SDPBackend.CUDNN_ATTENTION,
        torch.nn.attention.SDPBackend.FLASH_ATTENTION,
    ):

        def by_torch(backend: Any = backend) -> object:
            with torch.nn.attention.sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads_first)

        try:
            dense[backend.name.lower()] = timed(by_torch, args.repeats)
        except RuntimeError as error:
            echo(f"{backend.name} does not run here: {str(error).splitlines()[0]}")
    best = min(t["flushed_ms"] for t in dense.values())
    work = 4 * length**2 * head_dim * args.heads
    rows = []
    for density, kind in itertools.product(densities, ("random", "band")):
        plan = timed_plan(kind, args.heads, length, density)
        kept = plan.density(length, length).mean().item()
        sparse = timed(
            lambda plan=plan: sparse_attention(q, k, v, plan, backend="triton"), args.repeats
        )
        own = dense["own"]["flushed_ms"]
        row = {
            "what": "sparse", "S": length, "H": args.heads, "D": head_dim, "dtype": "bfloat16",
            "mask": kind,
            "density": kept, **sparse, "tflops": kept * work / sparse["flushed_ms"] / 1e9,
            "efficiency_own": kept * own / sparse["flushed_ms"],
            "efficiency_best": kept * best / sparse["flushed_ms"],
            "speedup_best": best / sparse["flushed_ms"], "best_dense_ms": best,
            "dense": {n: {**t, "tflops": work / t["flushed_ms"] / 1e9} for n, t in dense.items()},
        }  # fmt: skip
        row["others"] = other_backends(q, k, v, plan, args.repeats)
        if head_dim == 128 and length >= 32768 and density in TARGETS:
            row["target"] = TARGETS[density]
            row["meets_target"] = row["efficiency_own"] >= TARGETS[density]
        rows.append(row)
        echo(
            f"S={length} D={head_dim} {kind:6} density {kept:.3f}: {row['tflops']:.0f} TFLOP/s, "
            f"efficiency {row['efficiency_own']:.2f} of own dense, "
            f"{row['speedup_best']:.2f}x against the best dense"
        )
    return rows


def other_backends(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, repeats: int
) -> dict[str, dict[str, float] | str]:
    """Times of the backends on request at the same mask, or why one cannot run."""
    found: dict[str, dict[str, float] | str] = {}
    for name in ON_REQUEST:
        is_able, reason = is_supported(name, q, plan)
        if not is_able:
            found[name] = reason
            continue
        try:
            found[name] = timed(
                lambda name=name: sparse_attention(q, k, v, plan, backend=name), repeats
            )
        except Exception as error:  # a foreign kernel may fail in any way; ours go on
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found


def timed_plan(kind: str, heads: int, length: int, density: float) -> SparsePlan:
    """Equally many key blocks per row: random ones, or those nearest the diagonal."""
    rows, columns = -(-length // BLOCK_Q), -(-length // BLOCK_K)
    count = max(1, round(density * columns))
    if kind == "random":
        scores = torch.rand(1, heads, rows, columns, device="cuda")
    else:
        row = torch.arange(rows, device="cuda")[:, None] * (BLOCK_Q / BLOCK_K) + 0.5
        distance = (row - torch.arange(columns, device="cuda")).abs()
        scores = (-distance).expand(1, heads, rows, columns)
    return SparsePlan.from_mask(select_blocks(scores, Count(count)), BLOCK_Q, BLOCK_K)


def planning_rows(
    length: int, head_dim: int, dense_ms: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """What a plan costs, as a share of dense attention; the budget is 5 % from 32k tokens on."""
    shape = (1, length, args.heads, head_dim)
    q, k = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lse = torch.full((1, args.heads, length), 10.0, device="cuda")

    def pooled() -> Tensor:
        return centroid_scores(mean_pool(q, BLOCK_Q).mean, mean_pool(k, BLOCK_K).mean)

    scores = pooled()
    calls: dict[str, Callable[[], object]] = {
        "mean pool + softmax": pooled,
        "antidiagonal, stride 16": lambda: antidiagonal_scores(
            q, k, stride=16, block_q=BLOCK_Q, block_k=BLOCK_K
        ),
        "block mass": lambda: block_mass(q, k, lse, block_q=BLOCK_Q, block_k=BLOCK_K),
        "select mass + pack": lambda: SparsePlan.from_mask(
            select_blocks(scores, MassKept(0.9)), BLOCK_Q, BLOCK_K
        ),
    }
    rows = []
    for name, call in calls.items():
        times = timed(call, args.repeats)
        share = times["flushed_ms"] / dense_ms
        rows.append(
            {"what": name, "S": length, "H": args.heads, "D": head_dim, **times, "of_dense": share}
        )
        echo(f"S={length} D={head_dim} {name}: {times['flushed_ms']:.2f} ms, {share:.1%} of dense")
    return rows


def combine_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """`linear_combine` of hidden states against torch's own operations, in bytes per second."""
    rows = []
    for count in (1, 2, 3, 4):
        tensors = [
            torch.randn(1, 75600, 5120, device="cuda", dtype=torch.bfloat16) for _ in range(count)
        ]
        weights = [0.5, -1.0, 2.0, 0.25][:count]
        moved = (count + 1) * tensors[0].numel() * 2
        for backend in ("triton", "torch"):
            times = timed(
                lambda b=backend, t=tensors, w=weights: linear_combine(t, w, backend=b),
                args.repeats,
            )
            rate = moved / times["flushed_ms"] / 1e9
            rows.append(
                {
                    "what": "linear_combine",
                    "tensors": count,
                    "backend": backend,
                    **times,
                    "tb_per_s": rate,
                }
            )
            echo(
                f"linear_combine of {count} by {backend}: {times['flushed_ms']:.2f} ms, "
                f"{rate:.2f} TB/s"
            )
    return rows


def change_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The change statistic, and what a copy reaches: the bandwidth everything is held against."""
    a, b = (torch.randn(1, 75600, 5120, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    moved = 2 * a.numel() * a.element_size()
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: a.copy_(b),
        "relative_change": lambda: relative_change(a, b, backend="triton"),
        "relative_change by torch": lambda: relative_change(a, b, backend="torch"),
    }
    rows = []
    for name, call in calls.items():
        times = timed(call, args.repeats)
        row = {"what": name, **times, "tb_per_s": moved / times["flushed_ms"] / 1e9}
        share = row["tb_per_s"] / (rows[0] if rows else row)["tb_per_s"]
        rows.append(row | {"of_copy": share, "target": LEAST_OF_COPY})
        echo(f"{name}: {row['tb_per_s']:.2f} TB/s, {share:.0%} of a copy")
    return rows


def timed(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median milliseconds with a flushed L2 cache and with a warm one, and the spread."""
    for _ in range(3):
        call()
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    result = {}
    for name in ("flushed", "warm"):
        times = []
        for _ in range(repeats):
            if name == "flushed":
                flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        result[f"{name}_ms"] = statistics.median(times)
        result[f"{name}_spread"] = (max(times) - min(times)) / result[f"{name}_ms"]
    return result


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    commit = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    return {
        "gpu": torch.cuda.get_device_name(), "driver": _output(query), "commit": _output(commit),
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": triton.__version__, "seed": 0,
    }  # fmt: skip


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _as(value: Any, dtype: torch.dtype) -> Any:
    """Outputs, keys and values in another dtype; LSE and counts as they are."""
    if isinstance(value, Centroids):
        return Centroids(value.key.to(dtype), value.value.to(dtype), value.counts)
    return value[0].to(dtype), value[1]


def _offsets(heads: int, length: int, blocks: int) -> Tensor:
    inner = torch.randint(0, length + 1, (1, heads, blocks - 1), device="cuda").sort(-1).values
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=length).int()


def _rms(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    main()
