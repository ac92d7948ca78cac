"""Which kernel and tile pool a lookup: picked by shape, before the first launch, without tuning.

The thresholds are what was quickest of the candidates on an H100 at the paper's 151M and 1.6B sizes with uniform
indices, where memory sets the pace: tensor cores up to some thousand tokens, above that, by a little, a warp that takes
rows one after the other. `make gpu` measures what is picked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ultramem.ops.triton._launch import cdiv, next_power_of_2

LANES = 32
LOAD_BYTES = 16  # of a lane: the widest load
WARP_LOAD_BYTES = LANES * LOAD_BYTES
FEW_TOKENS = 64  # up to which four warps share a tile of rows
FEW_TOKENS_WARPS = 4
FEW_TOKENS_SLOTS = 128
MAX_GROUP = 4
PRODUCT_TOKENS = 2048  # up to which tensor cores are the faster way


@dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """What a lookup is, but for its tokens."""

    slots: int  # of a token
    columns: int  # of a core's share of a row, in loaded elements
    itemsize: int  # of a loaded element
    cores: int
    blocks: int
    group: int = MAX_GROUP  # blocks of a program, each with accumulators of its own
    row_loads: int = 8  # loads of rows of a lane in a tile; elements that take registers to unpack want fewer


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolTile:
    """Constants of the pooling kernels."""

    group: int  # blocks that a program pools
    slots: int  # rows
    columns: int
    at_once: int  # rows that one load of all lanes covers
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"GROUP": self.group, "SLOTS": self.slots, "COLUMNS": self.columns, "AT_ONCE": self.at_once}


def row_columns(lookup: Lookup) -> int:
    """Columns of a warp: 16 bytes for each lane, or fewer where that leaves less of the last tile empty."""
    widest = WARP_LOAD_BYTES // lookup.itemsize
    most = min(widest, next_power_of_2(lookup.columns))
    padded = {c: cdiv(lookup.columns, c) * c for c in (most, most // 2, most // 4) if 8 * c >= widest}
    if not padded:
        return most
    return next(c for c, columns in padded.items() if 8 * columns <= 9 * min(padded.values()))


@cache
def many_tokens(lookup: Lookup) -> PoolTile:
    """One warp a program: it waits for no other warp."""
    columns = row_columns(lookup)
    slots = min(LANES, lookup.row_loads * max(1, WARP_LOAD_BYTES // (columns * lookup.itemsize)))
    return _tile(lookup, slots, columns, warps=1)


@cache
def few_tokens(lookup: Lookup) -> PoolTile:
    """Four warps that ask for all rows of few columns at once: the decode shape."""
    slots = min(FEW_TOKENS_SLOTS, max(8, next_power_of_2(lookup.slots)))
    tile_bytes = lookup.row_loads * FEW_TOKENS_WARPS * WARP_LOAD_BYTES
    columns = min(row_columns(lookup), tile_bytes // (slots * lookup.itemsize))
    return _tile(lookup, slots, columns, warps=FEW_TOKENS_WARPS)


def _tile(lookup: Lookup, slots: int, columns: int, *, warps: int) -> PoolTile:
    at_once = max(1, min(slots, warps * WARP_LOAD_BYTES // (columns * lookup.itemsize)))
    return PoolTile(
        group=min(lookup.group, lookup.blocks),
        slots=slots,
        columns=columns,
        at_once=at_once,
        warps=warps,
    )


TILES = (few_tokens, many_tokens)


def pool_tile(tokens: Any, lookup: Lookup) -> PoolTile:
    """The tile for so many tokens; a number that a compiler leaves open counts as many."""
    return few_tokens(lookup) if statically_known_true(tokens <= FEW_TOKENS) else many_tokens(lookup)


def takes_products(tokens: Any) -> bool:
    """Are tensor cores the faster way for 16-bit numbers? Not if a compiler leaves the number of tokens open."""
    return statically_known_true(tokens <= PRODUCT_TOKENS)


def capability_of(device: torch.device) -> int:
    """Compute capability of a CUDA device; that of an H100 where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
