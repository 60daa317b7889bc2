"""Compile a representative set of kernels with the real compiler for three generations of GPUs."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_kernels_fit_and_use_matrix_instructions(repository, tmp_path):
    """The command itself fails on spills, on too much shared memory and on missing instructions."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.kernel_table", "--quick", "--json", str(out)]
    run = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads(out.read_text())
    assert {row["cc"] for row in rows} == {80, 90, 100}
    attention = [row for row in rows if row["kernel"] == "sparse_attention_fwd_kernel"]
    assert len(attention) >= 10
    assert all(row["async_copies"] > 0 for row in attention)
    sixteen_bits = [row for row in attention if row["variant"].startswith("bf16")]
    expected = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    assert all(row["matrix"] == expected[row["cc"]] for row in sixteen_bits)
