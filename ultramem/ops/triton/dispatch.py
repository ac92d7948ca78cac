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
WARP_LOAD_BYTES = LANES * LOAD_BYTES
MOST_PROGRAMS = 32  # of a processor at a time
FEW_TOKENS_WARPS = 4
FEW_TOKENS_SLOTS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What the model needs of a GPU."""

    processors: int
    bytes_per_us: float  # of HBM
    clock_mhz: int
    latency_us: float = 0.7  # of a load that misses L2
    issues_per_clock: int = 4  # of a processor: warps' instructions

    @property
    def bytes_in_flight_needed(self) -> float:
        """Of a processor, for full bandwidth, by Little's law: 17.8 KB on an H100."""
        return self.bytes_per_us * self.latency_us / self.processors


# By compute capability: A100, H100 SXM, B200.
DEVICES = {
    80: Device(processors=108, bytes_per_us=2.0e6, clock_mhz=1410),
    90: Device(processors=132, bytes_per_us=3.35e6, clock_mhz=1755),
    100: Device(processors=148, bytes_per_us=8.0e6, clock_mhz=1850),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """What a lookup is, but for its tokens."""

    slots: int  # of a token
    columns: int  # of a core's share of a row, in loaded elements
    itemsize: int  # of a loaded element
    cores: int
    blocks: int
    row_loads: int = 8  # loads of rows of a lane in a tile; elements that take registers to unpack want fewer


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolTile:
    """Constants of the pooling kernels, and how many of their programs a processor holds."""

    group: int  # blocks that a program pools, one after the other
    slots: int  # rows
    columns: int
    at_once: int  # rows that one load of all lanes covers
    warps: int
    itemsize: int
    resident: int

    @property
    def constants(self) -> dict[str, int]:
        return {"GROUP": self.group, "SLOTS": self.slots, "COLUMNS": self.columns, "AT_ONCE": self.at_once}

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of rows under way in a full processor, if half of each tile's loads are."""
        return self.resident * self.slots * self.columns * self.itemsize // 2


def row_columns(lookup: Lookup) -> int:
    """Columns of a warp: 16 bytes for each lane, or fewer where that leaves less of the last tile empty."""
    widest = WARP_LOAD_BYTES // lookup.itemsize
    most = min(widest, next_power_of_2(lookup.columns))
    padded = {c: triton.cdiv(lookup.columns, c) * c for c in (most, most // 2, most // 4) if 8 * c >= widest}
    if not padded:
        return most
    return next(c for c, columns in padded.items() if 8 * columns <= 9 * min(padded.values()))


def many_tokens(lookup: Lookup) -> PoolTile:
    """One warp a program: it waits for no other warp, and 32 of them in 64 registers keep 64 KB in flight."""
    columns = row_columns(lookup)
    slots = min(LANES, lookup.row_loads * max(1, WARP_LOAD_BYTES // (columns * lookup.itemsize)))
    return _tile(lookup, min(MAX_GROUP, lookup.blocks), slots, columns, warps=1)


def some_tokens(lookup: Lookup) -> PoolTile:
    """As for many, with a program for each block: chains E times as short, slots ordered E times as often."""
    many = many_tokens(lookup)
    return _tile(lookup, 1, many.slots, many.columns, warps=1)


def few_tokens(lookup: Lookup) -> PoolTile:
    """A program for each block, its four warps asking for all of the block's rows at once: the decode shape."""
    slots = min(FEW_TOKENS_SLOTS, max(8, next_power_of_2(triton.cdiv(lookup.slots, lookup.blocks))))
    tile_bytes = lookup.row_loads * FEW_TOKENS_WARPS * WARP_LOAD_BYTES
    columns = min(row_columns(lookup), tile_bytes // (slots * lookup.itemsize))
    return _tile(lookup, 1, slots, columns, warps=FEW_TOKENS_WARPS)


def _tile(lookup: Lookup, group: int, slots: int, columns: int, *, warps: int) -> PoolTile:
    at_once = max(1, min(slots, warps * WARP_LOAD_BYTES // (columns * lookup.itemsize)))
    return PoolTile(
        group=group,
        slots=slots,
        columns=columns,
        at_once=at_once,
        warps=warps,
        itemsize=lookup.itemsize,
        resident=MOST_PROGRAMS // warps,
    )


TILES = (few_tokens, some_tokens, many_tokens)


def modelled_us(tile: PoolTile, device: Device, lookup: Lookup, tokens: int) -> float:
    """Time of a launch by the model, without the launch itself."""
    groups = triton.cdiv(lookup.blocks, tile.group)
    programs = tokens * lookup.cores * triton.cdiv(lookup.columns, tile.columns) * groups
    row_bytes = tile.columns * tile.itemsize
    tiles = tile.group * triton.cdiv(triton.cdiv(lookup.slots, lookup.blocks), tile.slots)
    # Of a warp, read from the cubins: 250 to permute and order 32 slots, 5 an element of a row.
    ordering = 250 * max(1.0, lookup.slots / (LANES * tile.warps)) if lookup.blocks > 1 else 0
    instructions = ordering + tiles * (tile.slots / tile.at_once) * 5 * (LOAD_BYTES // tile.itemsize)
    issue_rate = device.issues_per_clock * device.clock_mhz * device.processors
    bytes_us = programs * (lookup.slots / groups) * row_bytes / device.bytes_per_us
    issue_us = programs * tile.warps * instructions / issue_rate
    chain_us = instructions / device.clock_mhz + (3 + tiles) * device.latency_us
    waves = triton.cdiv(programs, device.processors * tile.resident)
    # The three overlap, but not wholly.
    costs = (bytes_us, issue_us, waves * chain_us)
    return float(0.75 * max(costs) + 0.25 * sum(costs))


@lru_cache(maxsize=256)
def pool_tiles(lookup: Lookup, capability: int) -> tuple[tuple[int, PoolTile], ...]:
    """Tiles, each with the token count up to which it is modelled to be the fastest, fewest tokens first."""
    device = DEVICES[max((known for known in DEVICES if known <= capability), default=min(DEVICES))]
    tiles = [build(lookup) for build in TILES]
    up_to: dict[PoolTile, int] = {}
    for tokens in (2**power for power in range(13)):
        up_to[min(tiles, key=lambda tile: modelled_us(tile, device, lookup, tokens))] = tokens  # used here
    return tuple(sorted(((tokens, tile) for tile, tokens in up_to.items()), key=lambda each: each[0]))


def pool_tile(tokens: Any, lookup: Lookup, capability: int) -> PoolTile:
    """The tile for so many tokens; a number that a compiler leaves open counts as many."""
    *fewer, (_, most) = pool_tiles(lookup, capability)
    return next((tile for up_to, tile in fewer if statically_known_true(tokens <= up_to)), most)


def capability_of(device: torch.device) -> int:
    """Compute capability of a CUDA device; that of an H100 where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
