"""Compile every Triton kernel variant ahead of time, without a GPU, and table what each one takes.

`python -m benchmarks.kernel_table` prints the table, `--write` puts it into kernels/README.md,
`--quick` takes a representative set and `--json FILE` writes the rows. A variant that does not
fit the chip's shared memory, spills registers or uses no matrix instruction where it should ends
the command with exit code 1.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from click import echo
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from blockcache.kernels.block_scores.kernel import (
    antidiagonal_scores_triton,
    assign_clusters_triton,
    block_mass_triton,
    mean_pool_triton,
)
from blockcache.kernels.linear_combine.kernel import linear_combine_triton, relative_change_triton
from blockcache.kernels.select.kernel import select_blocks_triton
from blockcache.kernels.sparse_attention import Centroids, SparsePlan
from blockcache.kernels.sparse_attention import kernel as attention_kernel
from blockcache.kernels.sparse_attention.kernel import sparse_attention_triton

# Shared memory a block may ask for, in bytes; the chips have 1 KiB more, which is the system's.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTION = {
    80: r"\bmma\.sync",
    90: r"\bwgmma\.mma_async|\bmma\.sync",
    100: r"\btcgen05\.mma|\bmma\.sync",
}
POINTER_TYPE = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
    torch.int64: "*i64", torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip
README = Path(__file__).resolve().parent.parent / "kernels" / "README.md"
MARKS = ("<!-- kernel table: begin -->", "<!-- kernel table: end -->")


@dataclass(frozen=True)
class Variant:
    """One launch to compile: `launch` calls the launcher of a kernel folder on CPU tensors."""

    name: str
    launch: Callable[[], object]
    uses_matrix: bool = True
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """What one compiled kernel takes."""

    variant: str
    kernel: str
    cc: int
    registers: int
    spills: int
    shared_kib: float
    warps: int
    matrix: str
    async_copies: int


def compile_variant(variant: Variant, cc: int) -> list[Row]:
    """Compile all kernels that one launch starts, for compute capability `cc`."""
    return [_compile_launch(variant, *launch, cc) for launch in _recorded(variant.launch)]


def _recorded(
    call: Callable[[], object],
) -> list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]:
    """The Triton launches that `call` makes, none of which runs."""
    launches = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return launches


def _compile_launch(
    variant: Variant, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], cc: int
) -> Row:
    options = {
        k: kwargs.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in kwargs
    }
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        kind, divisible = _specialise(value)
        if param.is_constexpr or kind == "constexpr":
            signature[param.name] = "constexpr"
            constants[param.name] = value
        else:
            signature[param.name] = kind
        if divisible and signature[param.name] != "constexpr":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    ptx = compiled.asm["ptx"]
    found = re.findall(MATRIX_INSTRUCTION[cc], ptx)
    registers, spills = _resources(ptx)
    return Row(
        variant.name, kernel.__name__, cc, registers, spills,
        round(compiled.metadata.shared / 1024, 1), compiled.metadata.num_warps,
        max(set(found), key=found.count) if found else "",
        len(re.findall(r"cp\.async\.c[ag]", ptx)),
    )  # fmt: skip


def _specialise(value: Any) -> tuple[str, bool]:
    """Argument type and divisibility by 16, as Triton's launcher derives them."""
    if isinstance(value, Tensor):
        return POINTER_TYPE[value.dtype], True
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", False
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    return ("fp32", False) if isinstance(value, float) else ("constexpr", False)


def _resources(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes per thread, as the assembler reports them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # Newer PTX than the plain assembler reads is written where the second one ships.
    tool = tools / "ptxas-blackwell"
    tool = tool if tool.exists() else tools / "ptxas"
    target = re.search(r"\.target\s+(\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        text = subprocess.run(
            [tool, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", text)))
    return int(re.search(r"Used (\d+) registers", text)[1]), spills


def variants() -> Iterator[Variant]:
    """Every launch that ships, at the sizes of a 720p video model."""
    yield from _attention_variants()
    for dtype, head_dim in itertools.product((torch.bfloat16, torch.float32), (64, 128)):
        yield from _scorer_variants(dtype, head_dim)
    for rule, blocks in itertools.product("ABC", (1024, 4096)):
        yield _select_variant(rule, True, blocks)
    for dtype, count, base in itertools.product(
        (torch.bfloat16, torch.float32), (1, 4), (False, True)
    ):
        yield _combine_variant(dtype, count, base)


def _attention_variants() -> Iterator[Variant]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(bf16, head_dim) for head_dim in (64, 72, 80, 96, 112, 128)]
    for dtype, head_dim in [*cases, (fp32, 64), (fp32, 72), (fp32, 128)]:
        quick = dtype == bf16 and head_dim == 128
        # Fixed blocks, then everything that the same kernel can do.
        yield _attention(dtype, head_dim, (128, 64), quick=head_dim in (64, 128))
        yield _attention(dtype, head_dim, (128, 64), length=4100, lse=True)
        yield _attention(dtype, head_dim, None, lse=True)
        yield _attention(dtype, head_dim, (0, 0))
        yield _attention(dtype, head_dim, (0, 0), order=True)
        yield _attention(dtype, head_dim, (0, 0), order=True, lse=True, extras=True, quick=quick)
        yield _attention(dtype, head_dim, (128, 64), lse=True, extras=True)
    for head_dim in (64, 128):
        yield _attention(bf16, head_dim, None, lengths=True)
        yield _attention(fp16, head_dim, (128, 128))
        for size in (16, 32, 64, 256):
            yield _attention(bf16, head_dim, (size, size))


def _attention(
    dtype: torch.dtype, head_dim: int, blocks: tuple[int, int] | None, *, length: int = 4096,
    order: bool = False, lse: bool = False, extras: bool = False, lengths: bool = False,
    quick: bool = False,
) -> Variant:  # fmt: skip
    """One attention launch; `blocks` None is dense, (0, 0) is blocks of any lengths."""
    heads = 8

    def launch() -> None:
        q, k, v, o = (
            torch.empty(1, length, heads, head_dim, dtype=dtype).transpose(1, 2) for _ in range(4)
        )
        plan = _plan(blocks, length, order)
        initial = centroids = None
        if extras:
            initial = (torch.empty_like(q), torch.empty(1, heads, length))
            means = torch.empty(1, heads, plan.num_k_blocks, head_dim, dtype=dtype)
            centroids = Centroids(means, means, torch.ones(1, heads, plan.num_k_blocks))
        sparse_attention_triton(
            q, k, v, o, torch.empty(1, heads, length) if lse else None, plan, 0.1, initial,
            centroids,
            torch.full((1,), length, dtype=torch.int32) if lengths else None,
        )  # fmt: skip

    form = (
        "dense" if blocks is None else "ragged" if blocks == (0, 0) else f"{blocks[0]}x{blocks[1]}"
    )
    marks = {
        "tail": length % 64,
        "gather": order,
        "lse": lse,
        "init+centroids": extras,
        "lengths": lengths,
    }
    named = [_short(dtype), f"D={head_dim}", form, *(mark for mark, on in marks.items() if on)]
    return Variant(" ".join(named), launch, quick=quick)


def _plan(blocks: tuple[int, int] | None, length: int, order: bool) -> SparsePlan | None:
    if blocks is None:
        return None
    tokens = torch.arange(length, dtype=torch.int32)[None, None] if order else None
    if blocks == (0, 0):
        q_blocks, k_blocks = (
            torch.linspace(0, length, n + 1).int()[None, None]
            for n in (length // 256, length // 76)
        )
        rows, columns = q_blocks.shape[2] - 1, k_blocks.shape[2] - 1
    else:
        q_blocks, k_blocks = blocks
        rows, columns = -(-length // q_blocks), -(-length // k_blocks)
    mask = torch.ones(1, 1, rows, columns, dtype=torch.bool)
    return SparsePlan.from_mask(mask, q_blocks, k_blocks, tokens, tokens)


def _scorer_variants(dtype: torch.dtype, head_dim: int) -> Iterator[Variant]:
    x = torch.empty(1, 8, 4096, head_dim, dtype=dtype)
    means = torch.empty(1, 8, 100, head_dim, dtype=dtype)
    offsets = torch.linspace(0, 4096, 101).int()[None, None]
    order = torch.arange(4096)[None, None]
    name = f"{_short(dtype)} D={head_dim}"
    quick = head_dim == 128 and dtype == torch.bfloat16
    yield Variant(f"{name} pool 128", lambda: mean_pool_triton(x, 128, None, True), False)
    yield Variant(
        f"{name} pool ragged gather", lambda: mean_pool_triton(x, offsets, order, False), False
    )
    for stride in (8, 16):
        yield Variant(
            f"{name} antidiagonal stride {stride}",
            lambda stride=stride: antidiagonal_scores_triton(x, x, stride, 128, 128, 0.1),
            quick=quick and stride == 8,
        )
    for step in (1, 8):
        yield Variant(
            f"{name} block mass, every {step}",
            lambda step=step: block_mass_triton(x, x, x.float().sum(-1), 128, 64, step, 0.1),
            quick=quick and step == 1,
        )
    yield Variant(
        f"{name} assign",
        lambda: assign_clusters_triton(x, means, means.float().sum(-1)),
        quick=quick,
    )


def _select_variant(rule: str, forced: bool, blocks: int) -> Variant:
    def launch() -> None:
        scores = torch.zeros(1, 8, 32, blocks)
        mask = torch.zeros(scores.shape, dtype=torch.bool) if forced else None
        select_blocks_triton(scores, rule, scores[..., 0, 0], mask, 2, blocks // 2)

    name = f"rule {rule}, {blocks} blocks" + (", forced" if forced else "")
    return Variant(name, launch, False, quick=rule == "A" and blocks == 1024 and forced)


def _combine_variant(dtype: torch.dtype, count: int, base: bool) -> Variant:
    x = torch.empty(1 << 16, dtype=dtype)

    def launch() -> None:
        linear_combine_triton([x] * count, [0.5] * count, x if base else None, None)
        if count == 1 and not base:
            relative_change_triton(x, x, 3)

    name = f"{_short(dtype)} {count} tensors" + (" + base" if base else "")
    return Variant(name, launch, False, quick=dtype == torch.bfloat16 and count == 4 and base)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def problems(row: Row, uses_matrix: bool) -> list[str]:
    """What would keep a compiled variant from shipping."""
    found = []
    if row.shared_kib * 1024 > SHARED_LIMIT[row.cc]:
        found.append(f"{row.shared_kib} KiB of shared memory, limit {SHARED_LIMIT[row.cc] // 1024}")
    if row.spills:
        found.append(f"{row.spills} bytes spilled")
    if uses_matrix and not row.matrix and row.kernel != "key_table_fwd_kernel":
        found.append("no matrix instruction")
    return found


def markdown(rows: list[Row], quick: bool) -> str:
    """The table, one line per variant with the three chips side by side."""
    of = "the representative set (`--quick`)" if quick else "every variant"
    lines = [
        f"Triton {triton.__version__}, {of}; registers per thread, shared memory in "
        "KiB, matrix instruction; nothing spills.",
        "",
        "| kernel | variant | warps | sm_80 | sm_90 | sm_100 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    grouped: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if row.kernel == "key_table_fwd_kernel":
            # Launched before every sparse attention and hardly different: one line is enough.
            row = replace(row, variant="all")
        grouped.setdefault((row.kernel, row.variant), {})[row.cc] = row
    for (kernel, variant), by_cc in grouped.items():
        cells = [
            f"{r.registers}, {r.shared_kib:g}{', ' + r.matrix.split('.')[0] if r.matrix else ''}"
            for r in (by_cc[cc] for cc in SHARED_LIMIT)
        ]
        warps = by_cc[80].warps
        lines.append(
            f"| {kernel.removesuffix('_fwd_kernel')} | {variant} | {warps} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, check, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a representative set only")
    parser.add_argument("--write", action="store_true", help="put the table into kernels/README.md")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows, failed = [], []
    for variant in variants():
        if args.quick and not variant.quick:
            continue
        for cc in SHARED_LIMIT:
            with mock.patch.object(attention_kernel, "capability", lambda tensor, cc=cc: cc):
                compiled = compile_variant(variant, cc)
            rows += compiled
            for row in compiled:
                found = problems(row, variant.uses_matrix)
                failed += found
                if found:
                    echo(f"{row.kernel} {row.variant} sm_{cc}: {'; '.join(found)}", err=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if failed:
        raise SystemExit(f"{len(failed)} problems in {len(rows)} compiled kernels.")
    if args.write:
        before, rest = README.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        README.write_text(f"{before}{MARKS[0]}\n{markdown(rows, args.quick)}{MARKS[1]}{after}")
    elif not args.json:
        echo(markdown(rows, args.quick))
    echo(f"{len(rows)} kernels compiled for sm_80, sm_90 and sm_100; no problem found.")


if __name__ == "__main__":
    main()
