"""How this package registers an op: opaque to export, transparent to the compiler.

`torch.library.triton_op` has the behaviour that we want, but it imports Triton when the op is *defined* (0.6 s, and a
warning where Triton is not installed). `traceable_op` is the same arrangement from the public pieces, with Triton left
to the first launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import custom_op, infer_schema


def traceable_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register `fn` as op `name`, keep it whole in `torch.export`, inline it in `torch.compile` and AOTInductor.

    `fn` must be made of PyTorch operators and of Triton kernels wrapped by `torch.library.wrap_triton`; it serves as
    its own fake kernel.
    """

    def register(fn: Callable[..., Any]) -> Any:
        def eager(*args: Any, **kwargs: Any) -> Any:
            # Kernel launches on real tensors need not go through the higher-order op, which costs about 1 ms each.
            from torch._library.triton import set_wrap_triton_enabled

            with set_wrap_triton_enabled(False):
                return fn(*args, **kwargs)

        op = custom_op(name, eager, mutates_args=(), schema=infer_schema(fn, mutates_args=()))
        op.register_fake(fn)

        from torch._subclasses.functional_tensor import FunctionalTensorMode

        def inline(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            from torch.export._trace import custom_triton_ops_decomposition_disabled

            if custom_triton_ops_decomposition_disabled():
                return mode.__torch_dispatch__(func, types, args, kwargs)
            with mode:
                return fn(*args, **(kwargs or {}))

        op.register_torch_dispatch(FunctionalTensorMode, inline)
        return op

    return register


def opaque_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register `fn` as op `name` that no compiler looks into: for bodies whose order of additions must not change."""

    def register(fn: Callable[..., Any]) -> Any:
        return custom_op(name, fn, mutates_args=(), schema=infer_schema(fn, mutates_args=()))

    return register


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is added up in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
