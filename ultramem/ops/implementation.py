"""Which implementation of an op runs: picked by device, or forced for tests and benchmarks."""

from __future__ import annotations

import contextlib
import enum
import importlib.util
from collections.abc import Iterator
from functools import cache

import torch


class Implementation(enum.Enum):
    """AUTO: Triton on CUDA tensors, the C++ kernels on CPU tensors where they are built, aten elsewhere; and aten for
    float64 on CUDA, which the Triton kernels do not take.

    ATEN, TRITON, NATIVE (the C++ kernels): that one or an error. An op that has no kernel of its own for one of them
    is plain PyTorch under all of them.
    """

    AUTO = "auto"
    ATEN = "aten"
    TRITON = "triton"
    NATIVE = "native"


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


def forced_implementation() -> Implementation:
    """What `use_implementation` asks for here; AUTO outside of it."""
    return _forced


@cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(tensor: torch.Tensor) -> bool:
    """True if the op should launch its Triton kernels on `tensor`.

    Raises:
        RuntimeError: the tensor is on CUDA (or TRITON is forced) and Triton is not installed.
    """
    takes_it = tensor.is_cuda and tensor.dtype != torch.float64
    if not (takes_it if _forced is Implementation.AUTO else _forced is Implementation.TRITON):
        return False
    if not triton_is_installed():
        raise RuntimeError(
            f"no Triton kernel for a tensor on {tensor.device}: Triton is not installed (pip install triton); "
            "to run plain PyTorch instead, use ultramem.ops.use_implementation(Implementation.ATEN)"
        )
    return True


def runs_native(tensor: torch.Tensor) -> bool:
    """True if the op should call its C++ kernel, `torch.ops.ultramem_native.<op>`, on `tensor`. Loads the library.

    Raises:
        RuntimeError: NATIVE is forced, and the tensor is not on the CPU or the library is not there.
    """
    if _forced is Implementation.NATIVE:
        if tensor.device.type != "cpu":
            problem = f"the C++ kernels take tensors on the CPU, not on {tensor.device}"
        else:
            problem = _native_problem()
        if problem:
            raise RuntimeError(
                f"{problem}; to run plain PyTorch instead, use ultramem.ops.use_implementation(Implementation.ATEN)"
            )
        return True
    return _forced is Implementation.AUTO and tensor.is_cpu and not _native_problem()


@cache
def _native_problem() -> str:
    from ultramem.ops.native.library import library

    return library().problem
