"""Singular values and vectors of the small scoring cores: no host sync, exportable, no state."""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.ops import accumulation_dtype

# Squarings of the Gram matrix for r > 2, 2^10 power iterations: a second singular value of 0.99 of the first is damped
# to 1e-9. It is scaled to trace 1 every 5: the largest of r eigenvalues is then at least r^-1, and r^-32 is a normal
# float32 number up to r = 15.
ROUNDS = 2
SQUARINGS_PER_ROUND = 5


def leading_singular_pair(core_HRR: Tensor) -> tuple[Tensor, Tensor]:
    """Leading left and right singular vectors (u [H,R], t [H,R]), without gradient.

    They are in float32, or in float64 of a float64 core. Their free common sign is fixed by `sum(u) + sum(t) >= 0`.
    """
    core = core_HRR.detach().to(accumulation_dtype(core_HRR.dtype))
    t_HR = _leading_eigenvector(_product(core.transpose(1, 2), core))
    u_HR = _unit((core * t_HR.unsqueeze(1)).sum(2))
    negative = (u_HR.sum(1) + t_HR.sum(1) < 0).unsqueeze(1)
    return torch.where(negative, -u_HR, u_HR), torch.where(negative, -t_HR, t_HR)


def singular_values(core_HRR: Tensor) -> Tensor:
    """Singular values [H,R], descending, in the same type, with gradient: `d lambda_i = u_i^T dC t_i`."""
    core = core_HRR.to(accumulation_dtype(core_HRR.dtype))
    rest = core.detach()
    values = []
    for _ in range(core.shape[-1]):
        u_HR, t_HR = leading_singular_pair(rest)
        value_H = (u_HR * (core * t_HR.unsqueeze(1)).sum(2)).sum(1)
        values.append(value_H)
        rest = rest - (u_HR * value_H.detach().unsqueeze(1)).unsqueeze(2) * t_HR.unsqueeze(1)
    return torch.stack(values, dim=1)


def _leading_eigenvector(gram_HRR: Tensor) -> Tensor:
    """Unit eigenvector [H,R] of the largest eigenvalue of a symmetric matrix without negative eigenvalues."""
    if gram_HRR.shape[-1] == 2:  # the usual rank, in closed form: the rotation that makes the matrix diagonal
        angle_H = 0.5 * torch.atan2(2 * gram_HRR[:, 0, 1], gram_HRR[:, 0, 0] - gram_HRR[:, 1, 1])
        return torch.stack([angle_H.cos(), angle_H.sin()], dim=1)
    # `diagonal` would make Inductor of torch 2.13 warn of its own deprecated function.
    identity_RR = torch.eye(gram_HRR.shape[-1], device=gram_HRR.device, dtype=gram_HRR.dtype)
    for _ in range(ROUNDS):
        trace_H = (gram_HRR * identity_RR).sum((1, 2))
        gram_HRR = gram_HRR / trace_H.clamp_min(torch.finfo(torch.float32).tiny).view(-1, 1, 1)
        for _ in range(SQUARINGS_PER_ROUND):
            gram_HRR = _product(gram_HRR, gram_HRR)
    # The matrix is now t t^T up to scale; its row of the largest diagonal entry is t up to scale.
    row = (gram_HRR * identity_RR).sum(2).argmax(dim=1).view(-1, 1, 1)
    return _unit(gram_HRR.gather(1, row.expand(-1, 1, gram_HRR.shape[-1])).squeeze(1))


def _product(left_HRR: Tensor, right_HRR: Tensor) -> Tensor:
    """Products of tiny matrices as sums: a compiler fuses them with what is around, and no tf32 rounds them."""
    return (left_HRR.unsqueeze(3) * right_HRR.unsqueeze(1)).sum(2)


def _unit(vector_HR: Tensor) -> Tensor:
    scale = vector_HR.abs().amax(1, keepdim=True).clamp_min(torch.finfo(vector_HR.dtype).tiny)
    scaled = vector_HR / scale  # so that squares of small entries do not underflow
    return scaled / scaled.square().sum(1, keepdim=True).sqrt().clamp_min(torch.finfo(vector_HR.dtype).tiny)
