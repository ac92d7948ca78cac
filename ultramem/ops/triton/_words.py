"""Integers of 8 or 4 bits in the words that a load brings: unpacked without a conversion, put back in a row's order."""

from __future__ import annotations

import triton
import triton.language as tl

# Bits of a load's element; bytes, where a core's share of a row is no whole number of words.
WORD, BYTE = 32, 8


def word_bits(columns: int, bits: int) -> int:
    """Of the words of a core's `columns` integers."""
    return WORD if columns * bits % WORD == 0 else BYTE


@triton.jit
def flipped(words, BITS: tl.constexpr):
    """Words of v + 2^(BITS-1), unsigned, of words of v in two's complement: the top bit of each flips."""
    FLIP: tl.constexpr = -2139062144 if BITS == 8 else -2004318072
    return words.to(tl.int32) ^ FLIP


@triton.jit
def fraction(words, at: tl.constexpr, BITS: tl.constexpr):
    """1 + u / 2^BITS as float32, of element number `at` of each word, u: two instructions and no conversion.

    u lands in the highest bits of the mantissa of 1.0.
    """
    SHIFT: tl.constexpr = 23 - BITS - at * BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    moved = words << SHIFT if SHIFT >= 0 else words >> -SHIFT
    return ((moved & MASK) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def row_order(parts, COUNT: tl.constexpr):
    """Pooled columns as they lie in a row, from one tensor for each place in a word."""
    if COUNT == 1:
        row = parts[0]
    elif COUNT == 2:
        row = tl.interleave(parts[0], parts[1])
    elif COUNT == 4:
        row = tl.interleave(tl.interleave(parts[0], parts[2]), tl.interleave(parts[1], parts[3]))
    else:
        even = tl.interleave(tl.interleave(parts[0], parts[4]), tl.interleave(parts[2], parts[6]))
        odd = tl.interleave(tl.interleave(parts[1], parts[5]), tl.interleave(parts[3], parts[7]))
        row = tl.interleave(even, odd)
    return row
