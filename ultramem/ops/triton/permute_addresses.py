"""Kernel of permute_addresses: one launch instead of about eighty elementwise ones, the same integers bit for bit."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ultramem.ops.permute_addresses import PASSES, ROUNDS, schedule

# Addresses a program: 2 a thread. A launch permutes heads x top-m addresses a token, 84 at the largest preset, so small
# programs reach more of the device; the arithmetic (32 multiplications, 4 divisions) outweighs the 16 bytes moved.
BLOCK = 256
WARPS = 4


@triton.jit
def _hash(half, side, KEYS: tl.constexpr, at: tl.constexpr):
    mask: tl.constexpr = 2147483647
    mixed = (half * KEYS[at] + KEYS[at + 1]) & mask
    mixed = ((mixed * mixed) >> 16) & mask
    mixed = ((mixed * KEYS[at + 2] + KEYS[at + 3]) >> 16) & mask
    return (mixed * side) >> 31


@triton.jit
def _add(x, y, side, INVERSE: tl.constexpr):
    """x + y (INVERSE: x - y) modulo side, for x and y below it."""
    if INVERSE:
        total = x - y
        total = tl.where(total < 0, total + side, total)
    else:
        total = x + y
        total = tl.where(total >= side, total - side, total)
    return total


@triton.jit
def permute_addresses_kernel(
    addresses,
    out,
    count,
    SIZE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ROTATIONS: tl.constexpr,
    KEYS: tl.constexpr,
    PASSES: tl.constexpr,
    ROUNDS: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the keyed permutation of addresses; INVERSE undoes it, with rotations and keys in reverse order.

    Sides and keys are constants: a division by a constant is a multiplication, and a model holds a handful of
    (size, seed) pairs, each compiled once. Bytes: 8 read and 8 written an address. Registers: 26 to 28.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    address = tl.load(addresses + at, mask=at < count, other=0)
    size = tl.full([], SIZE, tl.int64)
    a = tl.full([], A, tl.int64)
    b = tl.full([], B, tl.int64)
    for step in tl.static_range(PASSES):
        rotation = tl.full([], ROTATIONS[step], tl.int64)
        if not INVERSE:
            address = _add(address, rotation, size, INVERSE)
        high = address // b
        low = address - high * b
        for turn in tl.static_range(ROUNDS):
            if (turn % 2 == 1) == INVERSE:
                high = _add(high, _hash(low, a, KEYS, (step * ROUNDS + turn) * 4), a, INVERSE)
            else:
                low = _add(low, _hash(high, b, KEYS, (step * ROUNDS + turn) * 4), b, INVERSE)
        address = tl.where(address < a * b, high * b + low, address)
        if INVERSE:
            address = _add(address, rotation, size, INVERSE)
    tl.store(out + at, address, mask=at < count)


def permute_launch(size: int, seed: int, *, inverse: bool) -> dict[str, Any]:
    """Constants and warps of the kernel."""
    plan = schedule(size, seed)
    assert ROUNDS % 2 == 0, "the kernel of the inverse starts with a round of the lower half"
    keys, rotations = (plan.keys[::-1], plan.rotations[::-1]) if inverse else (plan.keys, plan.rotations)
    words = tuple(word for key in keys for word in key)
    constants = {"SIZE": size, "A": plan.a, "B": plan.b, "ROTATIONS": rotations, "KEYS": words}
    return {**constants, "PASSES": PASSES, "ROUNDS": ROUNDS, "INVERSE": inverse, "BLOCK": BLOCK, "num_warps": WARPS}


def permute_addresses(addresses: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    out = addresses.new_empty(addresses.shape)
    count = addresses.numel()
    if count:
        grid = (triton.cdiv(count, BLOCK),)
        wrap_triton(permute_addresses_kernel)[grid](
            addresses, out, count, **permute_launch(size, seed, inverse=inverse)
        )
    return out
