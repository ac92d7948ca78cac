"""How ops are compared: against the float64 oracle, with the error of a low-precision eager run as the measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# An op may be this many times less exact than plain PyTorch in the same dtype; most are more exact, since they add in
# float32. Rounding the result once to its dtype is allowed besides, for cases in which eager happens to be exact.
FACTOR = 4.0


def assert_as_exact_as_eager(
    names: Sequence[str],
    actual: Sequence[Tensor],
    eager: Sequence[Tensor],
    exact: Sequence[Tensor],
    *,
    lost_bits: int = 0,
) -> None:
    """Each actual tensor is as near to the float64 one as `eager`, the reference run in the dtype under test.

    The reference in float64 is the oracle itself; there, `eager` is the float32 run and its error is scaled. A kernel
    whose method costs bits of the mantissa says how many: `lost_bits`.
    """
    for name, a, low, e in zip(names, actual, eager, exact, strict=True):
        assert a.shape == e.shape, name
        assert a.dtype == low.dtype or a.dtype == torch.float64, name
        if not e.numel():
            continue
        error = (a.double() - e).abs().max().item()
        rounding = torch.finfo(a.dtype).eps * e.abs().max().item()
        scale = torch.finfo(a.dtype).eps / torch.finfo(low.dtype).eps
        allowed = FACTOR * scale * (low.double() - e).abs().max().item() + rounding
        allowed *= 2**lost_bits
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor, ...]:
    """The function's value at detached `inputs`, and the gradient of each of them, dense."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    grads = torch.autograd.grad(value, leaves, grad_output.to(value))
    return (value.detach(), *(g.to_dense() if g.layout == torch.sparse_coo else g for g in grads))


def as_float64(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def as_eager(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Inputs of the eager run that is the measure: in their dtype, float64 in float32."""
    return [t.float() if t.dtype == torch.float64 else t for t in tensors]
