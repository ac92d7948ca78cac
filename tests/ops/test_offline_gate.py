"""Kernels compiled for sm_90 without a GPU, in a process of their own: this one's Triton may be the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "offline_gate.py", "--size", "1.6b", "--capability", "90"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])["kernels"]


def test_no_kernel_spills_at_the_largest_size(kernels: list[dict]) -> None:
    assert len(kernels) >= 24
    for kernel in kernels:
        assert kernel["spills"] == kernel["local_bytes"] == kernel["stack_bytes"] == 0, kernel


def test_value_rows_are_read_16_bytes_a_lane(kernels: list[dict]) -> None:
    readers = [k for k in kernels if k["wide_loads_expected"]]
    assert {k["kernel"] for k in readers} == {"lookup_reduce_kernel", "row_gradient_kernel", "score_gradient_kernel"}
    for kernel in readers:
        assert kernel["loads"].get("16", 0) >= kernel["wide_loads_expected"], kernel
