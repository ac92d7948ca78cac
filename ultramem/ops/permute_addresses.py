"""A keyed bijection of [0, size), computed: the shuffle of virtual addresses without a table of size entries.

A Feistel network over the pair (address // b, address % b) permutes the first a*b addresses, with a = isqrt(size) and
b = size // a; the fewer than a addresses behind them are mixed in by rotating all of [0, size) between two such passes.
A logical grid of n x n cells has no such rest. Each Feistel round adds a hash of one half to the other, modulo that
half's size, so it is inverted by subtracting; nothing grows past 2^63.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import traceable_op
from ultramem.ops.implementation import runs_native, runs_triton

PASSES = 2
ROUNDS = 4
MAX_SIZE = 2**62
_BITS_31 = 2**31


class Schedule(NamedTuple):
    """Constants of one (size, seed): sides, the rotation before each pass, and per round (multiplier, addend) x 2."""

    a: int
    b: int
    rotations: tuple[int, ...]
    keys: tuple[tuple[int, int, int, int], ...]


def schedule(size: int, seed: int) -> Schedule:
    """Constants of a permutation; a size that a compiler holds open becomes a constant itself."""
    return _schedule(int(size), seed)


@lru_cache(maxsize=256)
def _schedule(size: int, seed: int) -> Schedule:
    # A hash of the standard library, so that no version of anything changes what a trained table means.
    drawn = []
    for index in range(PASSES * ROUNDS):
        digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=16).digest()
        drawn.append([int.from_bytes(digest[4 * word : 4 * word + 4], "little") % _BITS_31 for word in range(4)])
    # Odd multipliers in the upper half of 31 bits, so that even small halves fill the bits that are kept.
    keys = tuple((m1 // 2 + 2**30 | 1, c1, m2 // 2 + 2**30 | 1, c2) for m1, c1, m2, c2 in drawn)
    a = math.isqrt(size)
    return Schedule(a=a, b=size // a, rotations=(0, size // 2), keys=keys)


def native_permutation(size: int, seed: int) -> tuple[int, ...]:
    """The same, flat, as the C++ ops take it: size, a, b, then the keys."""
    return _native_permutation(int(size), seed)


@lru_cache(maxsize=256)
def _native_permutation(size: int, seed: int) -> tuple[int, ...]:
    plan = _schedule(size, seed)
    return (size, plan.a, plan.b, *(word for key in plan.keys for word in key))


def _hash(half: Tensor, side: int, key: tuple[int, int, int, int]) -> Tensor:
    """Integers in [0, side) from integers below 2^31.5.

    The middle bits of a square keep the network from being a lattice: with multiplications alone, neighbours land at a
    few fixed distances.
    """
    m1, c1, m2, c2 = key
    mixed = (half * m1 + c1) % _BITS_31
    mixed = mixed * mixed // 2**16 % _BITS_31
    mixed = (mixed * m2 + c2) // 2**16 % _BITS_31
    return mixed * side // _BITS_31


def _feistel(address: Tensor, plan: Schedule, keys: tuple[tuple[int, int, int, int], ...], inverse: bool) -> Tensor:
    high, low = address // plan.b, address % plan.b
    for index in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        key = keys[index]
        if index % 2 == 0:
            high = _add(high, _hash(low, plan.a, key), plan.a, inverse)
        else:
            low = _add(low, _hash(high, plan.b, key), plan.b, inverse)
    return high * plan.b + low


def _add(x: Tensor, y: Tensor, side: int, inverse: bool) -> Tensor:
    """x + y (or x - y) modulo `side`, for x and y below it, without a division."""
    if inverse:
        difference = x - y
        return torch.where(difference < 0, difference + side, difference)
    total = x + y
    return torch.where(total >= side, total - side, total)


def permute_addresses_reference(addresses: Tensor, size: int, seed: int, *, inverse: bool = False) -> Tensor:
    """The oracle; being integer arithmetic on whole tensors it is the aten path and the exported form as well."""
    plan = schedule(size, seed)
    covered = plan.a * plan.b
    for index in reversed(range(PASSES)) if inverse else range(PASSES):
        keys = plan.keys[index * ROUNDS : (index + 1) * ROUNDS]
        rotation = torch.full_like(addresses, plan.rotations[index]) if plan.rotations[index] else None
        if rotation is not None and not inverse:
            addresses = _add(addresses, rotation, size, inverse=False)
        mixed = _feistel(addresses, plan, keys, inverse)
        addresses = mixed if covered == size else torch.where(addresses < covered, mixed, addresses)
        if rotation is not None and inverse:
            addresses = _add(addresses, rotation, size, inverse=True)
    return addresses


@traceable_op("ultramem::permute_addresses")
def _permute_addresses(addresses: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    if runs_triton(addresses):
        from ultramem.ops.triton import permute_addresses as kernels

        return kernels.permute_addresses(addresses, size, seed, inverse)
    if runs_native(addresses):
        permuted: Tensor = torch.ops.ultramem_native.permute_addresses(
            addresses, native_permutation(size, seed), inverse
        )
        return permuted
    return permute_addresses_reference(addresses, size, seed, inverse=inverse)


def require_seed(name: str, seed: int) -> None:
    """Raise unless `seed` can name a permutation."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be in [0, 2^63), got {seed}")


def permute_addresses(
    addresses: Tensor, size: int, seed: int, *, inverse: bool = False, checked: bool = False
) -> Tensor:
    """Permute addresses by a keyed bijection on [0, size) (UltraMem paper, section 3.2: the shuffle of virtual memory).

    Args:
        addresses: int64 of any shape, each in [0, size).
        size: E*N, the number of virtual addresses, 1 to 2^62.
        seed: which permutation; the same on every device, version and exported engine.
        inverse: undo the permutation of the same size and seed.
        checked: read the addresses and raise if one is out of range; this waits for the device and cannot be traced.

    Returns:
        int64 of the same shape, each in [0, size).

    Raises:
        TypeError: addresses are not int64, or size or seed is not an int.
        ValueError: size or seed is out of range, or (checked) an address is.
    """
    if not isinstance(addresses, Tensor):
        raise TypeError(f"addresses must be a torch.Tensor, got {type(addresses).__name__}")
    checks.require_int64("addresses", addresses)
    checks.require_positive("size", size)
    if size > MAX_SIZE:
        raise ValueError(f"size must be at most 2^62, got {size}")
    require_seed("seed", seed)
    if checked:
        checks.require_in_range("addresses", addresses, size)
    permuted: Tensor = _permute_addresses(addresses.contiguous(), size, seed, inverse)
    return permuted


def address_table(size: int, seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """A uniformly random permutation of [0, size) as a stored int64 table [size]: the paper's own shuffle.

    Apply it by `table[addresses]`; invert it by `table.argsort()`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu").to(device)
