"""Which implementation of an op runs: picked by device, or forced for tests and benchmarks."""

from __future__ import annotations

import contextlib
import enum
import importlib.util
from collections.abc import Iterator
from functools import cache

import torch


class Implementation(enum.Enum):
    """AUTO: Triton on CUDA tensors, aten elsewhere. ATEN and TRITON: that one or an error."""

    AUTO = "auto"
    ATEN = "aten"
    TRITON = "triton"


_forced = Implementation.AUTO


@contextlib.contextmanager
def use_implementation(implementation: Implementation) -> Iterator[None]:
    """Force an implementation inside the block.

    TRITON on CPU tensors needs Triton's interpreter: TRITON_INTERPRET=1 before the first import of Triton.
    """
    global _forced
    before, _forced = _forced, Implementation(implementation)
    try:
        yield
    finally:
        _forced = before


@cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(tensor: torch.Tensor) -> bool:
    """True if the op should launch its Triton kernels on `tensor`.

    Raises:
        RuntimeError: the tensor is on CUDA (or TRITON is forced) and Triton is not installed.
    """
    if _forced is Implementation.ATEN or (_forced is Implementation.AUTO and tensor.device.type != "cuda"):
        return False
    if not triton_is_installed():
        raise RuntimeError(
            f"no Triton kernel for a tensor on {tensor.device}: Triton is not installed (pip install triton); "
            "to run plain PyTorch instead, use ultramem.ops.use_implementation(Implementation.ATEN)"
        )
    return True
