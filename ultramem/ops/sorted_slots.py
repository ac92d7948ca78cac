"""All slots of a step by row: one sort, on which every pass over touched rows stands.

Shapes: N rows, T tokens, K slots a token, E blocks, S = T*K slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import opaque_op
from ultramem.ops.implementation import runs_triton
from ultramem.ops.permute_addresses import _permute_addresses, require_seed


class SortedSlots(NamedTuple):
    """Slots of a step in the order of their rows, then blocks, then as they came: the order of every addition."""

    keys_S: Tensor
    """row * E + block, ascending; int32 if N * E is below 2^31."""
    slots_S: Tensor
    """Which slot of [T,K], flat; int64."""


def keys_dtype(n: int, num_blocks: int) -> torch.dtype:
    """Half the passes of a radix sort where the keys allow it."""
    return torch.int32 if n * num_blocks < 2**31 else torch.int64


@opaque_op("ultramem::sort_slots")
def _sort_slots(
    indices_TK: Tensor, num_rows: int, num_blocks: int, permutation_seed: int | None = None
) -> tuple[Tensor, Tensor]:
    if runs_triton(indices_TK):
        from ultramem.ops.triton import sorted_slots as kernels

        keys_S, slots_S = kernels.sort_slots(indices_TK, num_rows, num_blocks, permutation_seed)
        return keys_S, slots_S
    if permutation_seed is not None:
        indices_TK = _permute_addresses(indices_TK, num_rows * num_blocks, permutation_seed, False)
    keys_TK = indices_TK % num_rows * num_blocks + indices_TK // num_rows
    keys_S, slots_S = keys_TK.flatten().to(keys_dtype(num_rows, num_blocks)).sort(stable=True)
    return keys_S, slots_S


@_sort_slots.register_fake
def _(indices_TK: Tensor, num_rows: int, num_blocks: int, permutation_seed: int | None = None) -> tuple[Tensor, Tensor]:
    count = indices_TK.numel()
    return indices_TK.new_empty(count, dtype=keys_dtype(num_rows, num_blocks)), indices_TK.new_empty(count)


def sort_slots(
    indices_TK: Tensor, num_rows: int, *, num_blocks: int = 1, permutation_seed: int | None = None
) -> SortedSlots:
    """The slots of a lookup in the order of the physical rows that they name.

    Args:
        indices_TK: virtual indices [T,K] in [0, num_rows*num_blocks), int64, as `lookup_reduce` takes them.
        num_rows: N, of the physical table.
        num_blocks: E, the virtual expansion.
        permutation_seed: the indices are addresses before this permutation.

    Returns:
        `SortedSlots`, for `adamw_segments_` and `adagrad_segments_`.

    Raises:
        TypeError: indices are not int64.
        ValueError: a number is out of range.
    """
    checks.require_tensor("indices_TK", indices_TK, ndim=2, shape="[T,K]")
    checks.require_int64("indices_TK", indices_TK)
    checks.require_positive("num_rows", num_rows)
    checks.require_positive("num_blocks", num_blocks)
    if permutation_seed is not None:
        require_seed("permutation_seed", permutation_seed)
    return SortedSlots(*_sort_slots(indices_TK.contiguous(), num_rows, num_blocks, permutation_seed))
