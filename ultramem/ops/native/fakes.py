"""Shapes and dtypes of what the C++ ops return, for compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register() -> None:
    """Give every op of the loaded library its fake kernel."""
    fakes: dict[str, Callable[..., Any]] = {
        "lookup_reduce": _lookup_reduce,
        "lookup_reduce_quantized": _lookup_reduce_quantized,
        "lookup_dot": _lookup_dot,
        "permute_addresses": _permute_addresses,
        "tucker_topk": _tucker_topk,
        "product_topk": _product_topk,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"ultramem_native::{name}", fake)


def _lookup_reduce(
    values_ND: Tensor, indices_TK: Tensor, scores_TKC: Tensor, num_blocks: int, permutation: list[int]
) -> Tensor:
    return values_ND.new_empty(indices_TK.shape[0], num_blocks, values_ND.shape[1])


def _lookup_reduce_quantized(
    rows_NB: Tensor,
    scales_N: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    num_blocks: int,
    permutation: list[int],
) -> Tensor:
    columns = rows_NB.shape[1] * (2 if rows_NB.dtype == torch.uint8 else 1)
    return scores_TKC.new_empty(indices_TK.shape[0], num_blocks, columns)


def _lookup_dot(rows_ND: Tensor, indices_TK: Tensor, query_TD: Tensor) -> Tensor:
    return rows_ND.new_empty(indices_TK.shape)


def _permute_addresses(addresses: Tensor, permutation: list[int], inverse: bool) -> Tensor:
    return torch.empty_like(addresses)


def _tucker_topk(
    row_scores_THRN: Tensor,
    col_scores_THRN: Tensor,
    cores_HCRR: Tensor,
    u_HR: Tensor,
    t_HR: Tensor,
    k: int,
    tail: int,
    two_tails: bool,
) -> tuple[Tensor, Tensor]:
    shape_THK = (*row_scores_THRN.shape[:2], k)
    scores_THKC = row_scores_THRN.new_empty(*shape_THK, cores_HCRR.shape[1])
    return scores_THKC, row_scores_THRN.new_empty(shape_THK, dtype=torch.int64)


def _product_topk(row_scores_THN: Tensor, col_scores_THN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape_THK = (*row_scores_THN.shape[:2], k)
    return row_scores_THN.new_empty(shape_THK), row_scores_THN.new_empty(shape_THK, dtype=torch.int64)
