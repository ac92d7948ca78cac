"""All slots of a step by row: one sort, on which every pass over touched rows stands.

Shapes: N rows, T tokens, K slots a token, E blocks, S = T*K slots.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.sorted_slots import SortedSlots, keys_dtype
from ultramem.ops.triton._launch import cdiv
from ultramem.ops.triton.permute_addresses import permutation_constants, permute

# Slots of a program: 2 a thread, as many small programs as the permutation has.
BLOCK = 256
WARPS = 4


@triton.jit
def slot_keys_kernel(indices, keys, count, N, E: tl.constexpr, PERMUTATION: tl.constexpr, BLOCK: tl.constexpr):
    """keys = row * E + block of each index: sorting by it brings a row's slots together, block after block.

    Bytes: 8 read and 4 written a slot.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + at, mask=at < count, other=0)
    if PERMUTATION is not None:
        index = permute(index, PERMUTATION, False)
    rows_N = tl.cast(N, tl.int64)
    block = tl.zeros_like(index)
    if E <= 16:
        for e in tl.static_range(1, E):
            block += (index >= e * rows_N).to(tl.int64)
    else:
        block = index // rows_N
    key = (index - block * rows_N) * E + block
    tl.store(keys + at, key.to(keys.dtype.element_ty), mask=at < count)


def slot_keys_launch(n: int, num_blocks: int, permutation_seed: int | None) -> dict[str, Any]:
    """Constants and warps of the kernel."""
    words = None if permutation_seed is None else permutation_constants(n * num_blocks, permutation_seed)
    return {"E": num_blocks, "PERMUTATION": words, "BLOCK": BLOCK, "num_warps": WARPS}


def sort_slots(indices_TK: Tensor, n: int, num_blocks: int, permutation_seed: int | None) -> SortedSlots:
    count = indices_TK.numel()
    keys_S = indices_TK.new_empty(count, dtype=keys_dtype(n, num_blocks))
    if count:
        slot_keys_kernel[(cdiv(count, BLOCK),)](
            indices_TK, keys_S, count, n, **slot_keys_launch(n, num_blocks, permutation_seed)
        )
    return SortedSlots(*keys_S.sort(stable=True))
