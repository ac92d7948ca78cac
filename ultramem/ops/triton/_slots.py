"""Where a slot's row is: the address that it names, permuted if there is a permutation, and the block it belongs to.

Shapes: N rows, T tokens, K slots a token.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ultramem.ops.triton._launch import next_power_of_2
from ultramem.ops.triton.permute_addresses import permutation_constants, permute

# Slots that are permuted at once: 4 a lane of one warp. A token with more takes several pieces.
MAX_PIECE = 128


@triton.jit
def locate(index, exists, first_block, N, GROUP: tl.constexpr):
    """Row, block in the group and membership of the group, of virtual indices: by comparisons, no 64-bit division."""
    local = index - first_block * N
    mine = exists & (local >= 0) & (local < GROUP * N)
    block = tl.zeros_like(local).to(tl.int32)
    for e in tl.static_range(1, GROUP):
        block += (local >= e * N).to(tl.int32)
    return local - block * N, block, mine


@triton.jit
def place_of(X: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Token, core and first column of a program that has COLUMNS of the X columns of one core of one token.

    Programs of a token are neighbours: together they read whole rows, and its indices from L2.
    """
    CHUNKS: tl.constexpr = (X + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    token = (program // (C * CHUNKS)).to(tl.int64)
    return token, program // CHUNKS % C, program % CHUNKS * COLUMNS


@triton.jit
def permute_slots(indices, permuted, K, PIECE: tl.constexpr, PERMUTATION: tl.constexpr):
    """Write the permuted addresses of a token's slots, each once a program; all programs write the same ones."""
    for k0 in range(0, K, PIECE):
        slot = k0 + tl.arange(0, PIECE)
        address = tl.load(indices + slot, mask=slot < K, other=0)
        tl.store(permuted + slot, permute(address, PERMUTATION, False), mask=slot < K)
    tl.debug_barrier()  # what the program's threads wrote is what they read next


def permutation_launch(k: int, size: int, permutation_seed: int | None) -> dict[str, Any]:
    """Constants of `permute_slots` for K slots a token of a virtual table of `size` rows."""
    piece = min(MAX_PIECE, next_power_of_2(max(k, 1)))
    permutation = None if permutation_seed is None else permutation_constants(size, permutation_seed)
    return {"PIECE": piece, "PERMUTATION": permutation}
