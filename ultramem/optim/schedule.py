"""The schedule of `ultramem.ops.LazyRows`: what each past step owes now, advanced at a cost that does not grow.

Shapes: S steps (or more) in the schedule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ultramem.ops.catch_up import DRIFT, DRIFT_EPS, LOG_DECAY

_FIRST_STEPS = 1024
_NEGLIGIBLE = 2.0**-60  # beside the first term of a drift, in float64


def new_schedule(device: torch.device) -> Tensor:
    """The schedule [S,3] before the first step."""
    return of_any_length(torch.zeros(_FIRST_STEPS, 3, dtype=torch.float64, device=device))


def with_room_for(schedule_S3: Tensor, step: int) -> Tensor:
    """The schedule, or a copy of twice the length if `step` is past its end."""
    if step < schedule_S3.shape[0]:
        return schedule_S3
    return of_any_length(torch.cat([schedule_S3, torch.zeros_like(schedule_S3)]))


def of_any_length(schedule_S3: Tensor) -> Tensor:
    """The same tensor, for which a compiled model needs no new graph when it grows."""
    torch._dynamo.maybe_mark_dynamic(schedule_S3, 0)
    return schedule_S3


def advance_(
    schedule_S3: Tensor, step: int, *, lr: float, weight_decay: float, betas: tuple[float, float] | None
) -> None:
    """Add step number `step` (from 1) to the schedule, in place; `betas` None: without momentum, decay alone."""
    schedule_S3[step, LOG_DECAY] = schedule_S3[step - 1, LOG_DECAY] + math.log1p(-lr * weight_decay)
    if betas is None:
        return
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    # Of the two series, that of DRIFT_EPS falls more slowly.
    horizon = 1 if beta1 == 0 else math.ceil(math.log(_NEGLIGIBLE) / math.log(beta1 / beta2))
    first = max(0, step - horizon)
    past_P3 = schedule_S3[first:step]
    age_P = torch.arange(step - first, 0, -1, dtype=torch.float64, device=schedule_S3.device)
    weight_P = lr / correction1 * (past_P3[:, LOG_DECAY] - schedule_S3[step, LOG_DECAY]).exp()
    past_P3[:, DRIFT] += weight_P * math.sqrt(correction2) * (beta1 / math.sqrt(beta2)) ** age_P
    past_P3[:, DRIFT_EPS] += weight_P * correction2 * (beta1 / beta2) ** age_P


def require_decaying_drift(betas: tuple[float, float]) -> None:
    """Raise unless the drift of an untouched row dies out."""
    beta1, beta2 = betas
    if not 0 <= beta1 < beta2 < 1:
        raise ValueError(f"betas must be 0 <= beta1 < beta2 < 1, so that momentum dies before its scale, got {betas}")
