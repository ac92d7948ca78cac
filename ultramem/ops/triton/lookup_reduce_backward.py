"""Backward of lookup_reduce: which kernels run for which gradients.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks, U distinct rows touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.ops.triton._launch import refuse_float64
from ultramem.ops.triton.row_gradient import row_gradient
from ultramem.ops.triton.score_gradient import score_gradient
from ultramem.ops.triton.sorted_slots import sort_slots


def lookup_reduce_backward(
    grad_TED: Tensor,
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    need_values: bool,
    need_scores: bool,
    permutation_seed: int | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the table [N,D] and of the scores [T,K,C], each empty unless it is needed."""
    refuse_float64(values_ND=values_ND, scores_TKC=scores_TKC)
    if not need_values:
        if not need_scores:
            return values_ND.new_empty(0), scores_TKC.new_empty(0)
        grad_scores = score_gradient(grad_TED, values_ND, indices_TK, scores_TKC, permutation_seed=permutation_seed)
        return values_ND.new_empty(0), grad_scores
    grad_values_ND = values_ND.new_zeros(values_ND.shape)
    slots = sort_slots(indices_TK, values_ND.shape[0], grad_TED.shape[1], permutation_seed)
    grad_scores = row_gradient(grad_TED, values_ND, scores_TKC, slots, None, grad_values_ND, need_scores=need_scores)
    return grad_values_ND, grad_scores


def lookup_reduce_backward_rows(
    grad_TED: Tensor,
    values_ND: Tensor,
    indices_TK: Tensor,
    scores_TKC: Tensor,
    need_scores: bool,
    permutation_seed: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Touched rows [U] ascending, their gradients [U,D], and the gradient of the scores [T,K,C]. Waits for U."""
    refuse_float64(values_ND=values_ND, scores_TKC=scores_TKC)
    num_blocks = grad_TED.shape[1]
    slots = sort_slots(indices_TK, values_ND.shape[0], num_blocks, permutation_seed)
    rows_U, targets_S = torch.unique_consecutive(slots.keys_S // num_blocks, return_inverse=True)
    grads_UD = values_ND.new_empty(rows_U.shape[0], values_ND.shape[1])
    grad_scores = row_gradient(grad_TED, values_ND, scores_TKC, slots, targets_S, grads_UD, need_scores=need_scores)
    return rows_U.to(torch.int64), grads_UD, grad_scores
