"""What the launches share."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor


def refuse_float64(**tensors: Tensor) -> None:
    """The kernels add in float32; a float64 tensor would lose half of its digits without a word."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            raise TypeError(
                f"{name} must be float32, bfloat16 or float16 for the Triton kernels, got {tensor.dtype}; "
                "use ultramem.ops.use_implementation(Implementation.ATEN)"
            )


def require_contiguous(**tensors: Tensor | None) -> None:
    """The kernels that write to a table in place find its rows by their numbers alone."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous for the Triton kernels, got strides {tensor.stride()}")


def cdiv(x: Any, y: int) -> Any:
    """x / y rounded up. Triton's own takes 5 us on the host, for it serves kernels too."""
    return (x + y - 1) // y


def next_power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()


def is_interpreted() -> bool:
    """Do kernels run in Triton's interpreter?"""
    return bool(triton.knobs.runtime.interpret)
