"""The best keys of a list without sorting it.

Rows, columns and cells are selected alike, in rounds that look at all keys of a list, G groups of them side by side:

0. The maximum of each group. The K-th largest maximum is a floor that K keys reach, and of keys in no particular order
   hardly more do (51 on average for K = 42 of N = 3584, 44 for the cells).
1. Which keys reach the floor. They go through scratch memory, where each counts the better ones: its rank.
2. to 66., where more do than the shortlist holds (one list in some thousands; many equal keys, or all large keys in one
   place): a higher threshold by bits, of keys and then of addresses, until few enough reach it.

Scores are read again in each round, from L1 after the first: keys that stay in registers would leave room for a quarter
of the programs.

Shapes: L lists to select from, G groups of a list, M keys that are wanted of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The two of every list, one a bit of a packed key, and one that tries the limit itself.
ROUNDS = tl.constexpr(67)


@triton.jit
def floor_of(best, M: tl.constexpr, BITS: tl.constexpr):
    """[L]: what at least M of each list's maxima [L,G] reach: the M-th largest, rounded down.

    To one of 2^BITS steps between the lowest and the highest of them; groups without a key, of maximum 0, do not
    count, and less than M with one give too high a floor. Two bits a time: three counts of at most 256 in one word.
    """
    lowest = tl.min(tl.where(best == 0, 0xFFFFFFFF, best), 1)
    above = tl.maximum(best, lowest[:, None]) - lowest[:, None]
    length = (tl.max(above, 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    shift = tl.maximum(length - BITS, 0).to(tl.uint32)
    above = (above >> shift[:, None]).to(tl.int32)
    steps = tl.zeros_like(length)
    for bit in range(0, BITS, 2):
        unit = (1 << (BITS - 2)) >> bit
        reach = (above >= (steps + unit)[:, None]).to(tl.int32)
        reach += (above >= (steps + 2 * unit)[:, None]).to(tl.int32) << 10
        reach += (above >= (steps + 3 * unit)[:, None]).to(tl.int32) << 20
        count = tl.sum(reach, 1)
        enough = ((count & 1023) >= M).to(tl.int32) + ((count >> 10 & 1023) >= M).to(tl.int32)
        steps += unit * (enough + (count >> 20 >= M).to(tl.int32))
    return lowest + (steps.to(tl.uint32) << shift)


@triton.jit
def highest_bit(word):
    """Number of the highest bit of 32 that is set, 0 for none."""
    high = word >> 16
    # Halves are exact as floats, whose exponent is the number.
    upper = (high.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 111
    lower = ((word & 65535).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.maximum(tl.where(high != 0, upper, lower), 0)


@triton.jit
def candidate_of(limit, bit, settled, round):
    """[L]: the packed key that a round tries: the limit, and in the search for the threshold one bit more."""
    unit = tl.full([], 1, tl.uint64) << tl.maximum(bit, 0).to(tl.uint64)
    return limit | tl.where((round >= 2) & (bit >= 0) & (settled == 0), unit, 0)


@triton.jit
def reaches(key, candidate, address, base):
    """key >= candidate of packed keys, for addresses base + address, of which the latter costs no register."""
    least = (candidate >> 32).to(tl.uint32)
    last = tl.minimum((~candidate & 0xFFFFFFFF).to(tl.int64), 1 << 30).to(tl.int32) - base
    return (key > least) | ((key == least) & (address <= last))


@triton.jit
def next_round(
    round,
    limit,
    bit,
    settled,
    candidate,
    best,
    marks,
    M: tl.constexpr,
    SLOTS: tl.constexpr,
    BITS: tl.constexpr,
    ADDRESS_BITS: tl.constexpr,
):
    """The next round and the state of each list [L], from the maxima [L,G] and the marks of what reaches the candidate.

    A list is settled once at least M and at most SLOTS of its keys reach its limit. Between the floor and the highest
    key the threshold has the bits that they share; the search begins with the first that they do not.
    """
    count = tl.sum(num_marks(marks), 1)
    if round == 0:
        floor = floor_of(best, M, BITS)
        limit = floor.to(tl.uint64) << 32
        apart = floor ^ tl.max(best, 1)
        bit = tl.where(apart == 0, 31, 32 + highest_bit(apart))
    else:
        enough = count >= M
        if round == 1:
            bit = tl.where(enough, bit, 63)  # less than M groups have a key: the floor is none
            shared = limit >> bit.to(tl.uint64) >> 1 << bit.to(tl.uint64) << 1
            limit = tl.where(enough, tl.where(count <= SLOTS, limit, shared), 0)
        else:
            limit = tl.where(enough, candidate, limit)
            bit -= 1
        settled |= (enough & (count <= SLOTS)).to(tl.int32)
        # The complements of addresses below 2^ADDRESS_BITS begin alike.
        at_addresses = (bit == 31) & (settled == 0)
        limit |= tl.where(at_addresses, (0xFFFFFFFF >> ADDRESS_BITS) << ADDRESS_BITS, 0).to(tl.uint64)
        bit = tl.where(at_addresses, ADDRESS_BITS - 1, bit)
    return tl.where(tl.min(settled) == 1, ROUNDS, round + 1), limit, bit, settled


@triton.jit
def num_marks(marks):
    """Bits that are set: what the compiler knows as a population count."""
    if marks.dtype == tl.uint64:
        return num_marks(marks.to(tl.uint32)) + num_marks((marks >> 32).to(tl.uint32))
    pairs = marks - ((marks >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return ((octets * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def lowest_mark(marks):
    """Number of the lowest bit, and the bits without it."""
    without = marks & (marks - 1)
    return ((marks ^ without).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, without
