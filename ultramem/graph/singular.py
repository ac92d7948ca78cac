"""Singular values and vectors of the small scoring cores, by repeated squaring: no host sync, exportable, no state."""

from __future__ import annotations

import torch
from torch import Tensor

SQUARINGS = 10  # 2^10 power iterations: a second singular value of 0.99 of the first is damped to 1e-9


def leading_singular_pair(core_HRR: Tensor) -> tuple[Tensor, Tensor]:
    """Leading left and right singular vectors (u [H,R], t [H,R]) in float32, without gradient.

    Their free common sign is fixed by `sum(u) + sum(t) >= 0`.
    """
    core = core_HRR.detach().float()
    power = _normalised(core.transpose(1, 2) @ core)
    for _ in range(SQUARINGS):
        power = _normalised(power @ power)
    # `power` is now t t^T; its row of the largest diagonal entry is t up to scale.
    row = power.diagonal(dim1=1, dim2=2).argmax(dim=1, keepdim=True).unsqueeze(-1)
    t_HR = _unit(power.gather(1, row.expand(-1, 1, core.shape[-1])).squeeze(1))
    u_HR = _unit((core @ t_HR.unsqueeze(-1)).squeeze(-1))
    negative = (u_HR.sum(1) + t_HR.sum(1) < 0).unsqueeze(1)
    return torch.where(negative, -u_HR, u_HR), torch.where(negative, -t_HR, t_HR)


def singular_values(core_HRR: Tensor) -> Tensor:
    """Singular values [H,R], descending, in float32, with gradient: `d lambda_i = u_i^T dC t_i`."""
    core = core_HRR.float()
    rest = core.detach()
    values = []
    for _ in range(core.shape[-1]):
        u_HR, t_HR = leading_singular_pair(rest)
        value_H = (u_HR * (core @ t_HR.unsqueeze(-1)).squeeze(-1)).sum(1)
        values.append(value_H)
        rest = rest - (u_HR * value_H.detach().unsqueeze(1)).unsqueeze(2) * t_HR.unsqueeze(1)
    return torch.stack(values, dim=1)


def _normalised(matrix_HRR: Tensor) -> Tensor:
    trace = matrix_HRR.diagonal(dim1=1, dim2=2).sum(1)
    return matrix_HRR / trace.clamp_min(torch.finfo(matrix_HRR.dtype).tiny).view(-1, 1, 1)


def _unit(vector_HR: Tensor) -> Tensor:
    norm = vector_HR.square().sum(1, keepdim=True).sqrt()
    return vector_HR / norm.clamp_min(torch.finfo(vector_HR.dtype).tiny)
