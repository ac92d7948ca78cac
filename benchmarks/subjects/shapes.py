"""The paper's three sizes, tables of them, and the indices that are looked up.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.row import Row

CPU_ROWS = 2**20  # of a table: 2 to 4 GB of float32, 64 times a 32 MB cache and more
BASE_GB = 2.0  # of a process on a GPU: the driver's share, the buffer that flushes the cache, small tensors
TILE_ROWS = 4093  # a prime: rows repeat after so many, in memory of their own


REHEARSAL = "rehearsal"
"""The size of a row that is rehearsed."""


class Size(NamedTuple):
    """One UltraMem layer; those with a number of parameters are of the paper's Table 6."""

    hidden_size: int
    value_dim: int
    key_dim: int
    knum: int
    top_m: int
    heads: int = 2
    cores: int = 2
    blocks: int = 4
    rank: int = 2

    @property
    def slots(self) -> int:
        return self.heads * self.top_m


SIZES = {
    "151m": Size(1024, 512, 256, 1100, 16),
    "680m": Size(1536, 768, 384, 1632, 35),
    "1.6b": Size(2048, 1024, 448, 1792, 42),
    "d256": Size(512, 256, 128, 1024, 32),  # of no paper: 2^20 rows of 256, 64 slots
    REHEARSAL: Size(32, 32, 16, 12, 3),
}


def size_of(row: Row) -> Size:
    return SIZES[row.size]


def dtype_of(row: Row) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, row.dtype)
    return dtype


def table_gb(size: str, itemsize: int = 2) -> float:
    """The paper's table."""
    return SIZES[size].knum ** 2 * SIZES[size].value_dim * itemsize / 1e9


def gathered_gb(size: str, tokens: int, itemsize: int = 2) -> float:
    """Rows [T,K,D] of a table, once a slot."""
    return tokens * SIZES[size].slots * SIZES[size].value_dim * itemsize / 1e9


def compiled(row: Row, function: Callable[..., Any]) -> Callable[..., Any]:
    """Under torch.compile for static shapes; rehearsed as it is, since the interpreter's kernels cannot be traced."""
    return function if row.size == REHEARSAL else torch.compile(function, fullgraph=True, dynamic=False)


def table_rows(row: Row, device: torch.device) -> int:
    """The paper's on a GPU, 2^20 on a CPU."""
    size = size_of(row)
    if device.type == "cpu" and row.size != REHEARSAL:
        return CPU_ROWS
    return size.knum**2


def make_table(n: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows [N,D] of normal values."""
    tile = torch.randn(min(n, TILE_ROWS), d, device=device).to(dtype)
    table = torch.empty(n, d, dtype=dtype, device=device)
    for start in range(0, n, tile.shape[0]):
        stop = min(n, start + tile.shape[0])
        table[start:stop] = tile[: stop - start]
    return table


class Indices:
    """Draws virtual indices [T,K] in [0, N*E): uniform, or with Zipf's law over rows, popular ones anywhere."""

    def __init__(self, kind: str, *, n: int, e: int, device: torch.device) -> None:
        self.kind, self.n, self.e, self.device = kind, n, e, device
        self.generator = torch.Generator(device).manual_seed(0)
        # A multiplier that shares no factor with N spreads the ranks over the table.
        self.stride = next(s for s in range(int(0.618 * n) + 1, 2 * n + 2) if math.gcd(s, n) == 1)

    def draw(self, t: int, k: int) -> Tensor:
        shape, options = (t, k), {"device": self.device, "generator": self.generator}
        if self.kind == "uniform":
            return torch.randint(self.n * self.e, shape, **options)
        # Zipf with exponent 1 by its inverse distribution: the log of the rank is uniform.
        uniform = torch.rand(shape, dtype=torch.float64, **options)
        rank = torch.exp(uniform * math.log(self.n + 1)).long().clamp_(1, self.n) - 1
        block = torch.randint(self.e, shape, **options)
        return block * self.n + rank * self.stride % self.n
