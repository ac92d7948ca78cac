"""How many warps of a kernel an SM holds at once, from what each program needs.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (8.0, 9.0, 10.0). Registers are
given to whole warps of one of the SM's four partitions, 256 at a time.
"""

from __future__ import annotations

from typing import NamedTuple

THREADS_PER_WARP = 32
REGISTERS = 65536  # of an SM
REGISTER_GRANULARITY = 256
PARTITIONS = 4
SHARED_GRANULARITY = 128
RESERVED_SHARED = 1024  # of each program, by the system


class Limits(NamedTuple):
    """What one SM holds."""

    warps: int
    programs: int
    shared_bytes: int


LIMITS = {80: Limits(64, 32, 164 * 1024), 90: Limits(64, 32, 228 * 1024), 100: Limits(64, 32, 228 * 1024)}


def resident_warps(capability: int, *, warps: int, registers: int, shared_bytes: int) -> int:
    """Warps that one SM holds, for programs of `warps` warps, `registers` a thread and `shared_bytes`."""
    limits = LIMITS[capability]
    registers_per_warp = _round_up(registers * THREADS_PER_WARP, REGISTER_GRANULARITY)
    warps_by_registers = REGISTERS // PARTITIONS // registers_per_warp * PARTITIONS
    shared = _round_up(shared_bytes + RESERVED_SHARED, SHARED_GRANULARITY)
    programs = min(limits.programs, limits.warps // warps, warps_by_registers // warps, limits.shared_bytes // shared)
    return programs * warps


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to
