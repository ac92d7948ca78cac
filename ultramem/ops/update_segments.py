"""A step of an optimiser on the rows that a lookup touched, straight from the gradient of what it pooled.

Each touched row's gradient is the sum over its slots in the order of `SortedSlots`: its segment of them. In Triton it
goes from registers into the row's step, and neither row gradients nor their number are written anywhere. Elsewhere it
is pooled by PyTorch and updated by `adamw_rows_` and `adagrad_rows_`.

Shapes: N rows, D value dim, T tokens, K slots a token, S = T*K slots, C cores, E blocks, U touched rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import accumulation_dtype, opaque_op
from ultramem.ops.catch_up import LazyRows
from ultramem.ops.implementation import runs_triton
from ultramem.ops.sorted_slots import SortedSlots
from ultramem.ops.update_rows import _adagrad_rows_, _adamw_rows_


@opaque_op("ultramem::adamw_segments_", mutates=("values_ND", "exp_avg_ND", "exp_avg_sq_ND", "last_step_N"))
def _adamw_segments_(
    values_ND: Tensor,
    exp_avg_ND: Tensor,
    exp_avg_sq_ND: Tensor,
    last_step_N: Tensor,
    schedule_S3: Tensor,
    keys_S: Tensor,
    slots_S: Tensor,
    grad_TED: Tensor,
    scores_TKC: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    slots = SortedSlots(keys_S, slots_S)
    state = (values_ND, exp_avg_ND, exp_avg_sq_ND, last_step_N, schedule_S3)
    rule = (step, lr, beta1, beta2, eps, weight_decay, seed)
    if runs_triton(values_ND):
        from ultramem.ops.triton import update_segments as kernels

        kernels.adamw_segments_(*(*state, slots, grad_TED, scores_TKC, *rule))
    elif keys_S.numel():
        _adamw_rows_(*state, *_segment_gradients(slots, grad_TED, scores_TKC), *rule)


@opaque_op("ultramem::adagrad_segments_", mutates=("values_ND", "row_sum_N", "last_step_N"))
def _adagrad_segments_(
    values_ND: Tensor,
    row_sum_N: Tensor,
    last_step_N: Tensor,
    schedule_S3: Tensor,
    keys_S: Tensor,
    slots_S: Tensor,
    grad_TED: Tensor,
    scores_TKC: Tensor,
    step: int,
    lr: float,
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    slots = SortedSlots(keys_S, slots_S)
    state = (values_ND, row_sum_N, last_step_N, schedule_S3)
    rule = (step, lr, eps, weight_decay, seed)
    if runs_triton(values_ND):
        from ultramem.ops.triton import update_segments as kernels

        kernels.adagrad_segments_(*(*state, slots, grad_TED, scores_TKC, *rule))
    elif keys_S.numel():
        _adagrad_rows_(*state, *_segment_gradients(slots, grad_TED, scores_TKC), *rule)


def _segment_gradients(slots: SortedSlots, grad_TED: Tensor, scores_TKC: Tensor) -> tuple[Tensor, Tensor]:
    """Touched rows [U] and their gradients [U,D] in the dtype in which they are added up."""
    e, d = grad_TED.shape[1:]
    _, k, c = scores_TKC.shape
    dtype = accumulation_dtype(grad_TED.dtype)
    rows_U, sizes_U = torch.unique_consecutive(slots.keys_S // e, return_counts=True)
    core_C1 = torch.arange(c, device=rows_U.device).unsqueeze(1)
    # A bag a core and row, of pieces of grad_TED seen as [T*E*C,D/C].
    pieces_CS = (slots.slots_S // k * e + slots.keys_S % e) * c + core_C1
    weights_CS = scores_TKC.flatten(0, 1).index_select(0, slots.slots_S).t().to(dtype)
    first_CU = sizes_U.cumsum(0) - sizes_U + core_C1 * slots.slots_S.numel()
    grads = torch.nn.functional.embedding_bag(
        pieces_CS.flatten(),
        grad_TED.to(dtype).reshape(-1, d // c),
        first_CU.flatten(),
        mode="sum",
        per_sample_weights=weights_CS.flatten(),
    )
    return rows_U.long(), grads.view(c, -1, d // c).transpose(0, 1).reshape(-1, d)


@_adamw_segments_.register_fake
def _(*state: Any) -> None:
    return None


@_adagrad_segments_.register_fake
def _(*state: Any) -> None:
    return None


def adamw_segments_(
    values_ND: Tensor,
    lazy: LazyRows,
    slots: SortedSlots,
    grad_TED: Tensor,
    scores_TKC: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    seed: int = 0,
) -> None:
    """`adamw_rows_` on the rows that a lookup touched, with the gradient that the lookup's backward would give them.

    Of the row n, `g = concat_c(sum over its slots (t,k) of score[t,k,c] * grad[t, block(k)]_c)`, in float32 (float64
    for a float64 table) and not rounded to the table's dtype in between.

    Args:
        values_ND: the table [N,D], float32, bfloat16 (updated in float32, rounded stochastically) or float64.
        lazy: its state as of `step - 1`; `last_step_N` and the moments are written, the schedule is not.
        slots: the lookup's, from `sort_slots`.
        grad_TED: of its pooled rows, in the dtype of the table.
        scores_TKC: the lookup's, in the dtype of the table or float32.
        step: from 1.
        lr: of this step.
        betas: of both moments.
        weight_decay: decoupled.
        seed: of the rounding.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape does not fit, or the state has no moments.
    """
    if lazy.exp_avg_ND is None or lazy.exp_avg_sq_ND is None:
        raise ValueError("lazy must have moments (exp_avg_ND, exp_avg_sq_ND), got None")
    _require_segments(values_ND, lazy, slots, grad_TED, scores_TKC)
    _adamw_segments_(
        *(values_ND, lazy.exp_avg_ND, lazy.exp_avg_sq_ND, lazy.last_step_N, lazy.schedule_S3),
        *(slots.keys_S, slots.slots_S, grad_TED.contiguous(), scores_TKC.contiguous()),
        *(step, lr, *betas, lazy.eps, weight_decay, seed),
    )


def adagrad_segments_(
    values_ND: Tensor,
    lazy: LazyRows,
    row_sum_N: Tensor,
    slots: SortedSlots,
    grad_TED: Tensor,
    scores_TKC: Tensor,
    *,
    step: int,
    lr: float,
    weight_decay: float,
    seed: int = 0,
) -> None:
    """`adagrad_rows_` on the rows that a lookup touched, with the gradient that the lookup's backward would give them.

    The gradient of a row is that of `adamw_segments_`.

    Args:
        values_ND: the table [N,D], float32, bfloat16 (updated in float32, rounded stochastically) or float64.
        lazy: its state as of `step - 1`, without moments; `last_step_N` is written.
        row_sum_N: sums of mean squares, float32 (float64 for a float64 table); written.
        slots: the lookup's, from `sort_slots`.
        grad_TED: of its pooled rows, in the dtype of the table.
        scores_TKC: the lookup's, in the dtype of the table or float32.
        step: from 1.
        lr: of this step.
        weight_decay: decoupled.
        seed: of the rounding.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape does not fit.
    """
    _require_segments(values_ND, lazy, slots, grad_TED, scores_TKC)
    checks.require_shape("row_sum_N", row_sum_N, values_ND.shape[:1], "the rows of values_ND")
    _adagrad_segments_(
        *(values_ND, row_sum_N, lazy.last_step_N, lazy.schedule_S3),
        *(slots.keys_S, slots.slots_S, grad_TED.contiguous(), scores_TKC.contiguous()),
        *(step, lr, lazy.eps, weight_decay, seed),
    )


def _require_segments(
    values_ND: Tensor, lazy: LazyRows, slots: SortedSlots, grad_TED: Tensor, scores_TKC: Tensor
) -> None:
    checks.require_tensor("values_ND", values_ND, ndim=2, shape="[N,D]")
    checks.require_tensor("grad_TED", grad_TED, ndim=3, shape="[T,E,D]")
    checks.require_tensor("scores_TKC", scores_TKC, ndim=3, shape="[T,K,C]")
    checks.require_same_dtype(values_ND=values_ND, grad_TED=grad_TED)
    checks.require_scores(values_ND, scores_TKC)
    t, k, _ = scores_TKC.shape
    (n, d), e = values_ND.shape, grad_TED.shape[1]
    checks.require_shape("grad_TED", grad_TED, (t, e, d), "T of scores_TKC, E, then D of values_ND")
    for name, tensor in slots._asdict().items():
        checks.require_shape(f"slots.{name}", tensor, (t * k,), "T*K of scores_TKC")
    checks.require_shape("lazy.last_step_N", lazy.last_step_N, (n,), "the rows of values_ND")


__all__ = ["adagrad_segments_", "adamw_segments_"]
