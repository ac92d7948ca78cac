"""The lookup on rows of int8, float8 or int4 with a scale each: a quarter or an eighth of the bytes, for inference.

Shapes: N rows, D value dim, B bytes a row (D, or D/2 for int4), T tokens, K slots a token (heads x top-m), C cores,
E blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import traceable_op
from ultramem.ops.huge_pages import LARGE_BYTES, advise_huge_pages
from ultramem.ops.implementation import runs_native, runs_triton
from ultramem.ops.lookup_reduce import _native_numbers, _permuted, lookup_reduce_reference
from ultramem.ops.permute_addresses import require_seed

FLOAT8 = torch.float8_e4m3fn
_VALUES_AT_ONCE = 1 << 20  # that quantize_rows holds in float32 at a time


class QuantizedRows(NamedTuple):
    """A table of small numbers and what they are multiplied by."""

    rows_NB: Tensor
    """int8 or float8_e4m3fn [N,D]; or uint8 [N,D/2], column 2j in the low half of byte j and column 2j+1 in the high
    half, each in two's complement."""
    scales_N: Tensor
    """[N] float32."""


def quantize_rows(values_ND: Tensor, bits: int = 8, *, floating: bool = False) -> QuantizedRows:
    """Round each row to the nearest of 2^bits - 1 multiples of its scale, which is its largest magnitude over
    2^(bits-1) - 1; or (`floating`) to float8 e4m3 times a scale that takes its largest magnitude to 448.

    Args:
        values_ND: a table [N,D] of any floating-point dtype; D is even for 4 bits.
        bits: 8 or 4.
        floating: the 8 bits are a float8_e4m3fn. Its kernel needs a GPU of compute capability 8.9.

    Returns:
        Rows and scales, on the device of the table. The error of a value is at most half the scale of its row, or
        (`floating`) 1/16 of the value or 2^-10 of the scale.

    Raises:
        TypeError: values_ND is not a floating-point tensor.
        ValueError: its rank is not 2, `bits` is neither 8 nor 4, D is odd for 4 bits, or 4 bits are `floating`.
    """
    checks.require_tensor("values_ND", values_ND, ndim=2, shape="[N,D]")
    checks.require_floating("values_ND", values_ND)
    if bits not in (4, 8):
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if floating and bits != 8:
        raise ValueError(f"bits must be 8 for floating rows, got {bits}")
    n, d = values_ND.shape
    if bits == 4 and d % 2:
        raise ValueError(f"values_ND must have an even number of columns for 4 bits, got {d}")
    dtype = FLOAT8 if floating else torch.int8 if bits == 8 else torch.uint8
    rows_NB = values_ND.new_empty(n, d if bits == 8 else d // 2, dtype=dtype)
    scales_N = values_ND.new_empty(n, dtype=torch.float32)
    advise_huge_pages(rows_NB, at_least_bytes=LARGE_BYTES)
    largest = torch.finfo(FLOAT8).max if floating else 2 ** (bits - 1) - 1
    step = max(1, _VALUES_AT_ONCE // max(1, d))
    for first in range(0, n, step):
        some = slice(first, first + step)
        values = values_ND[some].detach().float()
        scales = values.abs().amax(1) / largest if d else values.new_zeros(values.shape[0])
        numbers = (values / scales.where(scales > 0, 1).unsqueeze(1)).clamp(-largest, largest)
        rows_NB[some] = numbers.to(FLOAT8) if floating else _as_integers(numbers, bits)
        scales_N[some] = scales
    return QuantizedRows(rows_NB, scales_N)


def _as_integers(numbers_ND: Tensor, bits: int) -> Tensor:
    integers_ND = numbers_ND.round().to(torch.int8)
    return integers_ND if bits == 8 else _pack(integers_ND)


def _pack(integers_ND: Tensor) -> Tensor:
    halves_NBP = integers_ND.view(torch.uint8).unflatten(1, (-1, 2)) & 15
    packed_NB: Tensor = halves_NBP[..., 0] | halves_NBP[..., 1] << 4
    return packed_NB


def unpack_rows(rows_NB: Tensor) -> Tensor:
    """The small numbers of rows [...,B] as `quantize_rows` packed them: [...,D], without their scales."""
    if rows_NB.dtype != torch.uint8:
        return rows_NB
    halves_NBP = torch.stack([rows_NB & 15, rows_NB >> 4], -1).to(torch.int8)
    return ((halves_NBP ^ 8) - 8).flatten(-2)  # two's complement of four bits


def lookup_reduce_quantized_reference(
    rows_NB: Tensor, scales_N: Tensor, indices_TK: Tensor, scores_TKC: Tensor, *, num_blocks: int = 1
) -> Tensor:
    """The oracle: the lookup in the table that the small numbers stand for."""
    values_ND = unpack_rows(rows_NB).to(scores_TKC.dtype) * scales_N.to(scores_TKC.dtype).unsqueeze(1)
    return lookup_reduce_reference(values_ND, indices_TK, scores_TKC, num_blocks=num_blocks)


@traceable_op("ultramem::lookup_reduce_quantized")
def _lookup_reduce_quantized(
    rows_NB: Tensor,
    scales_N: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    permutation_seed: int | None = None,
) -> Tensor:
    if runs_triton(rows_NB):
        from ultramem.ops.triton import lookup_reduce_quantized as kernels

        return kernels.lookup_reduce_quantized(rows_NB, scales_N, indices_TK, scores_TKC, num_blocks, permutation_seed)
    n = rows_NB.shape[0]
    if runs_native(rows_NB) and rows_NB.dtype != FLOAT8:
        native_TED: Tensor = torch.ops.ultramem_native.lookup_reduce_quantized(
            rows_NB, scales_N, indices_TK, scores_TKC, num_blocks, _native_numbers(n * num_blocks, permutation_seed)
        )
        return native_TED
    indices_TK = _permuted(indices_TK, n * num_blocks, permutation_seed)
    t, k, c = scores_TKC.shape
    row_TK = indices_TK % n
    # float8 has no gather of its own everywhere: the bytes are moved.
    looked_up = rows_NB.view(torch.uint8)[row_TK.flatten()].view(rows_NB.dtype)
    numbers_TKD = unpack_rows(looked_up).float()
    d = numbers_TKD.shape[-1]
    block = torch.arange(num_blocks, device=indices_TK.device)
    member_TEK = (indices_TK // n).unsqueeze(1) == block.view(1, -1, 1)
    weights_TCK = (scores_TKC.float() * scales_N[row_TK].unsqueeze(-1)).transpose(1, 2)
    weights_TCEK = member_TEK.unsqueeze(1) * weights_TCK.unsqueeze(2)
    pooled_TCEX = weights_TCEK @ numbers_TKD.view(t, k, c, d // c).transpose(1, 2)
    return pooled_TCEX.transpose(1, 2).reshape(t, num_blocks, d).to(scores_TKC.dtype)


def _backward(ctx: Any, grad_TED: Tensor) -> None:
    raise RuntimeError(
        "lookup_reduce_quantized has no gradient, its rows are for inference: train with lookup_reduce, "
        "then quantize_rows"
    )


_lookup_reduce_quantized.register_autograd(_backward)


def lookup_reduce_quantized(
    rows_NB: Tensor,
    scales_N: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    *,
    num_blocks: int = 1,
    permutation_seed: int | None = None,
) -> Tensor:
    """`lookup_reduce` of the table `rows * scales`, for inference.

    `out[t,p] = sum_{k: block(k)=p} concat_c(score[t,k,c] * scale[row(k)] * rows[row(k)]_c)`.

    Args:
        rows_NB: int8 or float8_e4m3fn [N,D], or int4 packed two a byte in uint8 [N,D/2], as `quantize_rows` makes them.
        scales_N: [N] float32.
        indices_TK: virtual indices [T,K] in [0, N*num_blocks), int64. Duplicates add up. T may be 0.
        scores_TKC: weights [T,K,C], float32, bfloat16 or float16; C divides D, and D/C is even for int4.
        num_blocks: E, the virtual expansion.
        permutation_seed: the indices are addresses before the permutation, as in `lookup_reduce`.

    Returns:
        [T,E,D] in the dtype of the scores, accumulated in float32. A backward through it raises RuntimeError.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: rank, shape or device differ, or the cores do not divide the columns as said.
    """
    checks.require_tensor("rows_NB", rows_NB, ndim=2, shape="[N,B]")
    checks.require_tensor("scales_N", scales_N, ndim=1, shape="[N]")
    checks.require_tensor("indices_TK", indices_TK, ndim=2, shape="[T,K]")
    checks.require_tensor("scores_TKC", scores_TKC, ndim=3, shape="[T,K,C]")
    if rows_NB.dtype not in (torch.int8, torch.uint8, FLOAT8):
        raise TypeError(
            f"rows_NB must have dtype torch.int8, {FLOAT8}, or torch.uint8 (packed int4), got {rows_NB.dtype}"
        )
    if scales_N.dtype != torch.float32:
        raise TypeError(f"scales_N must have dtype torch.float32, got {scales_N.dtype}")
    if scores_TKC.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"scores_TKC must have a dtype of float32, bfloat16, float16, got {scores_TKC.dtype}")
    checks.require_int64("indices_TK", indices_TK)
    checks.require_shape("scales_N", scales_N, (rows_NB.shape[0],), "the rows of rows_NB")
    c = scores_TKC.shape[-1]
    checks.require_shape("scores_TKC", scores_TKC, (*indices_TK.shape, c), "[T,K] of indices_TK, then C")
    checks.require_same_device(rows_NB=rows_NB, scales_N=scales_N, indices_TK=indices_TK, scores_TKC=scores_TKC)
    checks.require_positive("num_blocks", num_blocks)
    if permutation_seed is not None:
        require_seed("permutation_seed", permutation_seed)
    packed = rows_NB.dtype == torch.uint8
    d = rows_NB.shape[1] * (2 if packed else 1)
    if c < 1 or d % c or (packed and d // c % 2):
        even = ", into even parts for int4" if packed else ""
        raise ValueError(f"scores_TKC must have a number of cores that divides the value dim {d}{even}, got {c}")
    pooled_TED: Tensor = _lookup_reduce_quantized(
        rows_NB.contiguous(),
        scales_N.contiguous(),
        indices_TK.contiguous(),
        scores_TKC.contiguous(),
        num_blocks,
        permutation_seed,
    )
    return pooled_TED
