"""Which tile pools a lookup: picked by device and shape from modelled costs, before the first launch, without tuning.

The model knows three ways to be slow: bytes over bandwidth, instructions over issue slots, and a program's chain of
dependent memory accesses times the waves of programs. Its figures are the data sheets' and the cubins'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ultramem.ops.triton._launch import next_power_of_2
from ultramem.ops.triton.slot_order import MAX_GROUP

LANES = 32
LOAD_BYTES = 16  # of a lane: the widest load
ROW_LOADS = 8  # loads of rows that a lane has in its tile


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What the model needs of a GPU."""

    processors: int
    bytes_per_us: float  # of HBM
    clock_mhz: int
    latency_us: float = 0.7  # of a load that misses L2
    issues_per_clock: int = 4  # of a processor: warps' instructions


# By compute capability: A100, H100 SXM, B200.
DEVICES = {
    80: Device(processors=108, bytes_per_us=2.0e6, clock_mhz=1410),
    90: Device(processors=132, bytes_per_us=3.35e6, clock_mhz=1755),
    100: Device(processors=148, bytes_per_us=8.0e6, clock_mhz=1850),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolTile:
    """Constants of the pooling kernels and the figures that the model has of them."""

    group: int
    """Blocks that a program pools, one after the other."""
    slots: int
    """Rows of a tile."""
    columns: int
    warps: int
    itemsize: int
    resident: int
    """Programs of a processor at a time: 32 at most, fewer if 64 registers a thread are more than there are."""

    @property
    def at_once(self) -> int:
        """Rows that one load of all lanes covers."""
        return max(1, min(self.slots, self.warps * LANES * LOAD_BYTES // (self.columns * self.itemsize)))

    @property
    def constants(self) -> dict[str, int]:
        return {"GROUP": self.group, "SLOTS": self.slots, "COLUMNS": self.columns, "AT_ONCE": self.at_once}

    @property
    def bytes_in_flight(self) -> int:
        """Of rows, in a processor full of programs, if half of each tile's loads are under way.

        Little's law asks for bandwidth times latency: 17.8 KB a processor of an H100 (3.35 MB/us * 0.7 us / 132).
        """
        return self.resident * self.slots * self.columns * self.itemsize // 2


def row_columns(x: int, itemsize: int) -> int:
    """Columns of a warp: 16 bytes for each lane, or fewer where that leaves less of the last tile empty."""
    widest = LANES * LOAD_BYTES // itemsize
    narrowest = max(1, min(next_power_of_2(x), widest // 8))
    choices = [c for c in (widest, widest // 2, widest // 4, widest // 8) if narrowest <= c <= next_power_of_2(x)]
    padded = {c: triton.cdiv(x, c) * c for c in choices or [narrowest]}
    return next(c for c, columns in padded.items() if columns * 8 <= min(padded.values()) * 9)


def many_tokens(k: int, x: int, num_blocks: int, itemsize: int) -> PoolTile:
    """One warp a program: nothing waits for another warp, and 32 programs a processor keep 64 KB in flight."""
    columns = row_columns(x, itemsize)
    at_once = LANES * LOAD_BYTES // (columns * itemsize)
    slots = min(ROW_LOADS * at_once, LANES)
    return PoolTile(
        group=min(MAX_GROUP, num_blocks), slots=slots, columns=columns, warps=1, itemsize=itemsize, resident=32
    )


def some_tokens(k: int, x: int, num_blocks: int, itemsize: int) -> PoolTile:
    """As for many tokens, with a program for each block: E times shorter chains, E times the ordering of slots."""
    many = many_tokens(k, x, num_blocks, itemsize)
    return PoolTile(group=1, slots=many.slots, columns=many.columns, warps=1, itemsize=itemsize, resident=32)


def few_tokens(k: int, x: int, num_blocks: int, itemsize: int) -> PoolTile:
    """Four warps a program and block, whose rows are all under way at once; columns make up the number of programs."""
    slots = min(128, max(8, next_power_of_2(triton.cdiv(k, num_blocks))))
    warps = 4
    columns = min(row_columns(x, itemsize), ROW_LOADS * warps * LANES * LOAD_BYTES // (slots * itemsize))
    return PoolTile(group=1, slots=slots, columns=columns, warps=warps, itemsize=itemsize, resident=8)


def modelled_us(tile: PoolTile, device: Device, t: int, k: int, x: int, c: int, num_blocks: int) -> float:
    """Time of a launch by the model, without the launch itself."""
    groups = triton.cdiv(num_blocks, tile.group)
    programs = t * c * triton.cdiv(x, tile.columns) * groups
    row_bytes = tile.columns * tile.itemsize
    rows = k / groups
    tiles = tile.group * triton.cdiv(triton.cdiv(k, num_blocks), tile.slots)
    loads_a_tile = tile.slots / tile.at_once
    # Instructions of a warp, read from the cubins: ordering (with a permutation) of 32 slots, and of a row's load.
    ordering = 250 * max(1.0, k / (LANES * tile.warps)) if num_blocks > 1 else 0
    instructions = ordering + tiles * loads_a_tile * 5 * (LOAD_BYTES // tile.itemsize)
    issued_us = programs * tile.warps * instructions / (device.issues_per_clock * device.clock_mhz * device.processors)
    alone_us = instructions / device.clock_mhz + (3 + tiles) * device.latency_us
    waves = triton.cdiv(programs, device.processors * tile.resident)
    bytes_us = programs * rows * row_bytes / device.bytes_per_us
    # The three overlap, but not wholly.
    costs = (bytes_us, issued_us, waves * alone_us)
    return 0.75 * max(costs) + 0.25 * sum(costs)


@lru_cache(maxsize=256)
def _thresholds(capability: int, k: int, x: int, c: int, num_blocks: int, itemsize: int) -> list[tuple[int, PoolTile]]:
    """Tiles with the token count up to which each is modelled to be the fastest, fewest tokens first."""
    device = DEVICES[max((known for known in DEVICES if known <= capability), default=min(DEVICES))]
    tiles = [build(k, x, num_blocks, itemsize) for build in (few_tokens, some_tokens, many_tokens)]
    found: dict[PoolTile, int] = {}
    for t in (2**power for power in range(13)):
        best = min(tiles, key=lambda tile: modelled_us(tile, device, t, k, x, c, num_blocks))  # noqa: B023
        found[best] = t
    return sorted(((t, tile) for tile, t in found.items()), key=lambda each: each[0])


def capability_of(device: torch.device) -> int:
    """Compute capability of a CUDA device; that of an H100 where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def pool_tile(t: Any, k: int, d: int, c: int, num_blocks: int, *, itemsize: int, capability: int) -> PoolTile:
    """The tile for T tokens; a size that a compiler leaves open counts as many."""
    thresholds = _thresholds(capability, k, d // c, c, num_blocks, itemsize)
    for most, tile in thresholds[:-1]:
        if statically_known_true(t <= most):
            return tile
    return many_tokens(k, d // c, num_blocks, itemsize)
