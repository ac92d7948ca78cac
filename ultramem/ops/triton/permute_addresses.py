"""Kernel of permute_addresses: one launch instead of about eighty elementwise ones, the same integers bit for bit."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ultramem.ops.permute_addresses import PASSES, ROUNDS, schedule
from ultramem.ops.triton._launch import cdiv

# Addresses a program: 2 a thread. A launch permutes heads x top-m addresses a token, 84 at the largest preset, so small
# programs reach more of the device; the arithmetic (32 multiplications, 4 divisions) outweighs the 16 bytes moved.
BLOCK = 256
WARPS = 4
_PASSES = tl.constexpr(PASSES)
_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _hash(half, side, KEYS: tl.constexpr, at: tl.constexpr):
    """A number in [0, side), of the width of `side`. Each product is one 32 x 32 -> 64 bit multiplication."""
    mask: tl.constexpr = 2147483647
    mixed = (half.to(tl.uint32) * KEYS[at] + KEYS[at + 1]) & mask
    mixed = (((mixed.to(tl.uint64) * mixed.to(tl.uint64)) >> 16) & mask).to(tl.uint32)
    mixed = (((mixed.to(tl.uint64) * KEYS[at + 2] + KEYS[at + 3]) >> 16) & mask).to(tl.uint32)
    return ((mixed.to(tl.uint64) * side.to(tl.uint64)) >> 31).to(side.dtype)


@triton.jit
def _add(x, y, side, INVERSE: tl.constexpr):
    """x + y (INVERSE: x - y) modulo side, for x and y below it."""
    if INVERSE:
        total = tl.where(x < y, x + side - y, x - y)
    else:
        total = x + y
        total = tl.where(total >= side, total - side, total)
    return total


@triton.jit
def permute(address, PERMUTATION: tl.constexpr, INVERSE: tl.constexpr):
    """The keyed permutation of `permutation_constants`, which gives the steps of the inverse in its own order.

    Addresses below 2^31 stay in 32 bits on the way: PER_ADDRESS instead of 260 instructions each.
    """
    SIZE: tl.constexpr = PERMUTATION[0]
    A: tl.constexpr = PERMUTATION[1]
    B: tl.constexpr = PERMUTATION[2]
    WORD: tl.constexpr = tl.uint32 if SIZE < 2**31 else tl.uint64
    size = tl.full([], SIZE, WORD)
    a = tl.full([], A, WORD)
    b = tl.full([], B, WORD)
    word = address.to(WORD)
    for step in tl.static_range(_PASSES):
        rotation = tl.full([], PERMUTATION[3 + step], WORD)
        if not INVERSE:
            word = _add(word, rotation, size, INVERSE)
        high = word // b
        low = word - high * b
        for turn in tl.static_range(_ROUNDS):
            if (turn % 2 == 1) == INVERSE:
                high = _add(high, _hash(low, a, PERMUTATION, 3 + _PASSES + (step * _ROUNDS + turn) * 4), a, INVERSE)
            else:
                low = _add(low, _hash(high, b, PERMUTATION, 3 + _PASSES + (step * _ROUNDS + turn) * 4), b, INVERSE)
        word = tl.where(word < a * b, high * b + low, word)
        if INVERSE:
            word = _add(word, rotation, size, INVERSE)
    return word.to(tl.int64)


@triton.jit
def permute_addresses_kernel(
    addresses, out, count, PERMUTATION: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr
):
    """out = the permutation (or its inverse) of addresses.

    Bytes: 8 read and 8 written an address. Registers: 26 to 28.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    address = tl.load(addresses + at, mask=at < count, other=0)
    tl.store(out + at, permute(address, PERMUTATION, INVERSE), mask=at < count)


def permutation_constants(size: int, seed: int, *, inverse: bool = False) -> tuple[int, ...]:
    """Size, sides, rotations and keys, flat and in the order of their use: constants of a kernel that permutes.

    Sides and keys are constants, since a division by a constant is a multiplication, and a model holds a handful of
    (size, seed) pairs, each compiled once.
    """
    plan = schedule(size, seed)
    assert ROUNDS % 2 == 0, "the kernel of the inverse starts with a round of the lower half"
    keys, rotations = (plan.keys[::-1], plan.rotations[::-1]) if inverse else (plan.keys, plan.rotations)
    return (size, plan.a, plan.b, *rotations, *(word for key in keys for word in key))


def permute_launch(size: int, seed: int, *, inverse: bool) -> dict[str, Any]:
    """Constants and warps of the kernel."""
    words = permutation_constants(size, seed, inverse=inverse)
    return {"PERMUTATION": words, "INVERSE": inverse, "BLOCK": BLOCK, "num_warps": WARPS}


def permute_addresses(addresses: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    out = addresses.new_empty(addresses.shape)
    count = addresses.numel()
    if count:
        grid = (cdiv(count, BLOCK),)
        wrap_triton(permute_addresses_kernel)[grid](
            addresses, out, count, **permute_launch(size, seed, inverse=inverse)
        )
    return out
