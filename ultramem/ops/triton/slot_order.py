"""A token's slots in the order of their blocks, so that one accumulator after the other pools a whole block.

With an accumulator per block every row costs a multiply-add for each of the E blocks; with slots in order it costs one,
and what there is to do with an address (permutation, block, row) is done for a vector of slots at once, not by every
lane that reads the row.

Shapes: N rows, T tokens, K slots a token, C cores, G groups of at most MAX_GROUP blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.triton._launch import next_power_of_2
from ultramem.ops.triton.permute_addresses import permutation_constants, permute

# Blocks of a group: a 64-bit word counts the slots of all of them, 16 bits each.
MAX_GROUP = 4
MAX_SLOTS = 2**16 - 1
# Slots that are ordered at once: 4 a lane of one warp. A token with more takes several pieces.
MAX_PIECE = 128


@triton.jit
def block_of(local, N, GROUP: tl.constexpr):
    """Block of a virtual index, counted from the first index of its group: by comparisons, no 64-bit division."""
    block = tl.zeros_like(local).to(tl.int32)
    for e in tl.static_range(1, GROUP):
        block += (local >= e * N).to(tl.int32)
    return block


@triton.jit
def locate(index, exists, first, N, GROUP: tl.constexpr, PERMUTATION: tl.constexpr):
    """Row, block in the group and membership of the group, of indices (before the permutation, if there is one)."""
    if PERMUTATION is not None:
        index = permute(index, PERMUTATION, False)
    local = index - first
    mine = exists & (local >= 0) & (local < GROUP * N)
    block = block_of(local, N, GROUP)
    return local - block * N, block, mine


@triton.jit
def _one(block, mine, GROUP: tl.constexpr):
    """A word with 1 in the counter of the slot's block."""
    one = mine.to(tl.int64)
    if GROUP > 1:
        one = one << (block * 16).to(tl.int64)
    return one


@triton.jit
def count_of(word, block):
    """The counter of a block."""
    return ((word >> block * 16) & 65535).to(tl.int32)


@triton.jit
def order_slots(
    indices,
    scores,
    scales,
    rows,
    weights,
    token,
    core,
    first_block,
    N,
    K,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    PERMUTATION: tl.constexpr,
):
    """Write a token's rows [K] and one core's weights [K], by block and then by slot; count them by block.

    Returns (sizes, begins): per block of the group its slots, and those before it. `scales` [N], if not None, multiply
    the weights of their rows. All programs of a token write the same rows to the same place.
    """
    rows_N = tl.cast(N, tl.int64)
    first = first_block * rows_N
    sizes = tl.full([], 0, tl.int64)
    if PIECES > 1:
        for piece in range(PIECES):
            slot = piece * PIECE + tl.arange(0, PIECE)
            index = tl.load(indices + token * K + slot, mask=slot < K, other=0)
            _, block, mine = locate(index, slot < K, first, rows_N, GROUP, PERMUTATION)
            sizes += tl.sum(_one(block, mine, GROUP), axis=0)
    before = tl.full([], 0, tl.int64)
    begins = tl.full([], 0, tl.int64)
    for piece in range(PIECES):
        slot = piece * PIECE + tl.arange(0, PIECE)
        # Loaded here and not in `locate`: torch.compile takes an argument of what gives a store's address as written.
        index = tl.load(indices + token * K + slot, mask=slot < K, other=0)
        row, block, mine = locate(index, slot < K, first, rows_N, GROUP, PERMUTATION)
        weight = tl.load(scores + (token * K + slot) * C + core, mask=mine, other=0.0).to(tl.float32)
        if scales is not None:
            weight *= tl.load(scales + row, mask=mine, other=0.0)
        one = _one(block, mine, GROUP)
        size = tl.sum(one, axis=0)
        if PIECES == 1:
            sizes = size
        # A block begins behind those before it: shifting the word by whole counters adds them up.
        begins = (sizes << 16) + (sizes << 32) + (sizes << 48)
        place = count_of(tl.cumsum(one, axis=0) + before + begins, block) - 1
        tl.store(rows + place, row.to(rows.dtype.element_ty), mask=mine)
        tl.store(weights + place, weight, mask=mine)
        before += size
    tl.debug_barrier()  # what the program's threads wrote is what they read next
    return sizes, begins


class SlotOrder(NamedTuple):
    """Memory of one launch for ordered slots."""

    rows_GTK: Tensor
    """int32, or int64 for a table of 2^31 rows or more."""
    weights_GTCK: Tensor
    """float32."""


def new_slot_order(indices_TK: Tensor, n: int, c: int, groups: int) -> SlotOrder:
    t, k = indices_TK.shape
    return SlotOrder(
        rows_GTK=indices_TK.new_empty(groups, t, k, dtype=torch.int32 if n < 2**31 else torch.int64),
        weights_GTCK=indices_TK.new_empty(groups, t, c, k, dtype=torch.float32),
    )


def order_constants(k: int, size: int, permutation_seed: int | None) -> dict[str, Any]:
    """Constants of `order_slots` for K slots a token of a virtual table of `size` rows."""
    if k > MAX_SLOTS:
        raise ValueError(f"indices_TK must have at most {MAX_SLOTS} slots a token for the Triton kernels, got {k}")
    piece = min(MAX_PIECE, next_power_of_2(max(k, 1)))
    permutation = None if permutation_seed is None else permutation_constants(size, permutation_seed)
    return {"PIECE": piece, "PIECES": triton.cdiv(k, piece), "PERMUTATION": permutation}
