"""Clipping by the global norm, where some gradients are dense and some name the touched rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ultramem.ops.parts import is_dtensor
from ultramem.optim.sparse_gradient import coalesced


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, *, combine: Callable[[Sequence[Tensor]], Tensor] | None = None
) -> Tensor:
    """Scale all gradients in place by `min(1, max_norm / (norm + 1e-6))`, with the norm over all of them together.

    As `torch.nn.utils.clip_grad_norm_` on the same gradients made dense, without making any dense: a sparse gradient
    is coalesced first (and left so in `grad`), since the norm of rows that are still to be added up is not theirs.

    Args:
        parameters: those without a gradient are skipped.
        max_norm: the largest 2-norm; infinity only measures.
        combine: the norm of everything, from the norms of what each parameter with a gradient has here, where other
            processes hold parts of them; None: the root of the sum of their squares.

    Returns:
        The norm before clipping, a scalar; 0 without gradients. Not finite if a gradient is not.

    Raises:
        ValueError: max_norm is not at least 0.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    elements = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if is_dtensor(parameter.grad):
            elements.append(parameter.grad.to_local())
        elif parameter.grad.layout == torch.sparse_coo:
            parameter.grad = coalesced(parameter.grad)
            elements.append(parameter.grad._values())
        else:
            elements.append(parameter.grad)
    if not elements:
        return torch.zeros(())
    device = elements[0].device
    # The sum of squares of a low-precision gradient is taken in float32.
    norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in elements]
    if combine is None:
        norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
    else:
        norm = combine(norms)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for x in elements:
        x.mul_(scale.to(x.device))
    return norm
