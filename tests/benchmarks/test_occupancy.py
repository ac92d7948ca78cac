"""Occupancy against the examples that NVIDIA prints, and at each of the limits."""

from __future__ import annotations

import pytest

from benchmarks.occupancy import resident_warps


@pytest.mark.parametrize(("warps", "occupancy"), [(4, 0.75), (10, 0.625)])
def test_examples_of_the_best_practices_guide(warps: int, occupancy: float) -> None:
    # CUDA C++ Best Practices Guide, "Calculating Occupancy": 37 registers a thread give 75 % with blocks of 128 threads
    # (12 blocks) and 63 % with blocks of 320 (4 blocks), of 64 warps and 65536 registers.
    assert resident_warps(80, warps=warps, registers=37, shared_bytes=0) == 64 * occupancy


def test_32_registers_fill_an_sm() -> None:
    assert resident_warps(90, warps=8, registers=32, shared_bytes=0) == 64
    assert resident_warps(90, warps=8, registers=33, shared_bytes=0) == 48


def test_programs_of_one_warp_are_limited_by_their_number() -> None:
    assert resident_warps(100, warps=1, registers=32, shared_bytes=0) == 32


@pytest.mark.parametrize(("capability", "programs"), [(80, 4), (90, 6), (100, 6)])
def test_shared_memory(capability: int, programs: int) -> None:
    # 36 KB and the reserved kilobyte: 4 in 164 KB, 6 in 228 KB.
    assert resident_warps(capability, warps=4, registers=32, shared_bytes=36 * 1024) == 4 * programs
