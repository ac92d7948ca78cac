"""float32 to bfloat16 such that the mean of many roundings is the number: updates below bfloat16's spacing add up.

Shapes: U rows, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.ops import _checks as checks

_DROPPED_BITS = 16
_DROPPED_MASK = (1 << _DROPPED_BITS) - 1
_WORD = 0xFFFFFFFF


def _int32(word: int) -> int:
    """The int32 of the same bits."""
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word


def _shifted_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int32, whose own is arithmetic."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _mix_(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which each input bit flips each output bit about half the time ("lowbias32").

    Constants: https://nullprogram.com/blog/2018/07/31/
    """
    x.bitwise_xor_(_shifted_right(x, 16)).mul_(_int32(0x7FEB352D))
    x.bitwise_xor_(_shifted_right(x, 15)).mul_(_int32(0x846CA68B))
    return x.bitwise_xor_(_shifted_right(x, 16))


def _random_bits(rows_U: Tensor, num_columns: int, seed: int, step: int) -> Tensor:
    """int32 [U,D], a function of (seed, step, row, column) alone."""
    row_U = torch.zeros_like(rows_U, dtype=torch.int32)
    words = (_int32(seed), _int32(seed >> 32), _int32(step), rows_U.to(torch.int32), (rows_U >> 32).to(torch.int32))
    for part in words:
        row_U = _mix_(row_U.bitwise_xor_(part).add_(_int32(0x9E3779B9)))
    column_D = torch.arange(num_columns, dtype=torch.int32, device=rows_U.device).mul_(_int32(0x9E3779B1))
    return _mix_(row_U.unsqueeze(1) + column_D)


def round_stochastically(values_UD: Tensor, rows_U: Tensor, *, seed: int, step: int) -> Tensor:
    """Round each number to one of its two bfloat16 neighbours, to each with the probability that keeps the mean.

    The choice is a hash of (seed, step, row, column): no random state, the same bits on every device and after
    resuming. Numbers that bfloat16 holds, infinities and NaN come out as they are.

    Args:
        values_UD: float32 [U,D].
        rows_U: int64 [U], the numbers of these rows in their table.
        seed: of the run.
        step: a row must not be rounded twice at the same step, or both roundings are one draw.

    Returns:
        bfloat16 [U,D].

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: rank, shape or device differ.
    """
    checks.require_tensor("values_UD", values_UD, ndim=2, shape="[U,D]")
    checks.require_tensor("rows_U", rows_U, ndim=1, shape="[U]")
    checks.require_int64("rows_U", rows_U)
    if values_UD.dtype != torch.float32:
        raise TypeError(f"values_UD must have dtype torch.float32, got {values_UD.dtype}")
    checks.require_shape("rows_U", rows_U, values_UD.shape[:1], "the rows of values_UD")
    checks.require_same_device(values_UD=values_UD, rows_U=rows_U)
    # A float's magnitude grows with its bits read as an integer, whatever its sign: adding a random share of the gap
    # to the dropped bits carries into the kept ones with the right probability.
    random_UD = _random_bits(rows_U, values_UD.shape[1], seed, step).bitwise_and_(_DROPPED_MASK)
    rounded_UD = random_UD.add_(values_UD.view(torch.int32)).bitwise_and_(~_DROPPED_MASK).view(torch.float32)
    return torch.where(values_UD.isfinite(), rounded_UD, values_UD).to(torch.bfloat16)
