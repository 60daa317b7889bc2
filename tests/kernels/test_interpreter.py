"""Run the tests of the Triton kernels in a process where Triton interprets them on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL_TESTS = Path(__file__).parent / "triton"


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the tests already run in this process"
)
def test_the_kernels_interpreted(repository):
    pytest.importorskip("triton")
    # Before Triton is imported, and in no process that other tests share.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNEL_TESTS)]
    run = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100
    assert "skipped" not in run.stdout
