"""One matrix product per group of consecutive tokens: the experts of a mixture, without padding or dropping.

The work is PyTorch's own `torch.nn.functional.grouped_mm`. It stands behind an op because its fake kernel (torch 2.13)
takes bfloat16 alone, so that a float32 model would not compile, and because its gradient is then ours to make safe for
strides that it refuses.

Shapes: T tokens sorted by group, D inputs, I outputs, E groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import opaque_op

ALIGNMENT_BYTES = 16  # of a row, which PyTorch's kernels ask for


def grouped_mm_reference(inputs_TD: Tensor, weights_EDI: Tensor, ends_E: Tensor) -> Tensor:
    """The oracle: a product per group."""
    parts = zip(_groups(inputs_TD, ends_E), weights_EDI, strict=True)
    return torch.cat([group_TD @ weight_DI for group_TD, weight_DI in parts])


def _groups(inputs_TD: Tensor, ends_E: Tensor) -> list[Tensor]:
    ends = ends_E.tolist()
    return [inputs_TD[first:end] for first, end in zip([0, *ends[:-1]], ends, strict=True)]


@opaque_op("ultramem::grouped_mm")
def _grouped_mm(inputs_TD: Tensor, weights_EDI: Tensor, ends_E: Tensor) -> Tensor:
    if inputs_TD.dtype == torch.float64:  # for oracles; PyTorch has no such kernel
        return grouped_mm_reference(inputs_TD, weights_EDI, ends_E)
    return F.grouped_mm(inputs_TD, weights_EDI, offs=ends_E)


@_grouped_mm.register_fake
def _(inputs_TD: Tensor, weights_EDI: Tensor, ends_E: Tensor) -> Tensor:
    return inputs_TD.new_empty(inputs_TD.shape[0], weights_EDI.shape[2])


@opaque_op("ultramem::grouped_mm_weight_grad")
def _grouped_mm_weight_grad(inputs_TD: Tensor, grad_TI: Tensor, ends_E: Tensor) -> Tensor:
    """[E,D,I]: the inputs of each group, transposed, times its gradients; zeros for an empty group."""
    if inputs_TD.dtype == torch.float64:
        groups = zip(_groups(inputs_TD, ends_E), _groups(grad_TI, ends_E), strict=True)
        return torch.stack([group_TD.T @ grad for group_TD, grad in groups])
    return F.grouped_mm(inputs_TD.t(), grad_TI, offs=ends_E)


@_grouped_mm_weight_grad.register_fake
def _(inputs_TD: Tensor, grad_TI: Tensor, ends_E: Tensor) -> Tensor:
    return inputs_TD.new_empty(ends_E.shape[0], inputs_TD.shape[1], grad_TI.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TI: Tensor) -> tuple[Tensor | None, ...]:
    inputs_TD, weights_EDI, ends_E = ctx.saved_tensors
    grad_TI = grad_TI.contiguous()
    grad_inputs = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_inputs = _grouped_mm(grad_TI, weights_EDI.transpose(1, 2), ends_E)
    if ctx.needs_input_grad[1]:
        grad_weights = _grouped_mm_weight_grad(inputs_TD, grad_TI, ends_E)
    return grad_inputs, grad_weights, None


_grouped_mm.register_autograd(_backward, setup_context=_setup_context)


def grouped_mm(inputs_TD: Tensor, weights_EDI: Tensor, ends_E: Tensor) -> Tensor:
    """`out[t] = inputs[t] @ weights[e]` for the group e of token t; groups are consecutive tokens.

    Args:
        inputs_TD: [T,D], float32, bfloat16, float16 or float64, sorted by group. T may be 0.
        weights_EDI: [E,D,I] in the dtype of the inputs.
        ends_E: [E] int32, where each group ends: ascending, the last one T. A group may be empty.

    Returns:
        [T,I] in the dtype of the inputs, with gradients into inputs and weights.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: rank, shape or device differ, or a row of D or I numbers is no multiple of 16 bytes.
    """
    checks.require_tensor("inputs_TD", inputs_TD, ndim=2, shape="[T,D]")
    checks.require_tensor("weights_EDI", weights_EDI, ndim=3, shape="[E,D,I]")
    checks.require_tensor("ends_E", ends_E, ndim=1, shape="[E]")
    checks.require_floating("inputs_TD", inputs_TD)
    checks.require_same_dtype(inputs_TD=inputs_TD, weights_EDI=weights_EDI)
    if ends_E.dtype != torch.int32:
        raise TypeError(f"ends_E must have dtype torch.int32, got {ends_E.dtype}")
    e, d, i = weights_EDI.shape
    checks.require_shape("inputs_TD", inputs_TD, (inputs_TD.shape[0], d), "[T,D] with the D of weights_EDI")
    checks.require_shape("ends_E", ends_E, (e,), "[E] with the E of weights_EDI")
    checks.require_same_device(inputs_TD=inputs_TD, weights_EDI=weights_EDI, ends_E=ends_E)
    for name, size in (("D", d), ("I", i)):
        if size * inputs_TD.element_size() % ALIGNMENT_BYTES:
            raise ValueError(
                f"{name} of weights_EDI must make rows of a multiple of {ALIGNMENT_BYTES} bytes in {inputs_TD.dtype}, "
                f"got {size}"
            )
    output_TI: Tensor = _grouped_mm(inputs_TD.contiguous(), weights_EDI.contiguous(), ends_E)
    return output_TI
