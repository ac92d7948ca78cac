"""Scores and addresses as integers of the same order, so that one comparison settles a tie."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_key(x):
    """float32 as uint32 of the same order; -0.0 and 0.0 are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def packed_key(key, address):
    """One uint64 of (uint32 key, uint32 address), ordered by key, then by the lower address first; 0 is below all."""
    return (key.to(tl.uint64) << 32) | (~address).to(tl.uint64)


@triton.jit
def packed_address(packed):
    """The address as int64."""
    return (~packed & 0xFFFFFFFF).to(tl.int64)
