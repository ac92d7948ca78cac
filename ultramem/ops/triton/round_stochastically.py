"""float32 to bfloat16 inside of a kernel, with the bits of ultramem/ops/round_stochastically.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_word(row, seed, step):
    """The part of the hash that the columns of a row share: uint32, of int64 rows."""
    row = row.to(tl.int64)
    seed = row * 0 + seed
    word = _mix(seed.to(tl.uint32) + 0x9E3779B9)
    word = _mix((word ^ (seed >> 32).to(tl.uint32)) + 0x9E3779B9)
    word = _mix((word ^ (row * 0 + step).to(tl.uint32)) + 0x9E3779B9)
    word = _mix((word ^ row.to(tl.uint32)) + 0x9E3779B9)
    return _mix((word ^ (row >> 32).to(tl.uint32)) + 0x9E3779B9)


@triton.jit
def to_element(x, word, column, dtype: tl.constexpr):
    """float32 as an element of the table: bfloat16 is rounded stochastically, everything else to nearest."""
    if dtype == tl.bfloat16:
        random = _mix(word + column.to(tl.uint32) * 0x9E3779B1) & 0xFFFF
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where((bits & 0x7F800000) != 0x7F800000, rounded, x)
    return x.to(dtype)
