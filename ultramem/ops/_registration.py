"""How this package registers an op: opaque to export, transparent to the compiler.

`torch.library.triton_op` has the behaviour that we want, but it imports Triton when the op is *defined* (0.6 s, and a
warning where Triton is not installed). `traceable_op` is the same arrangement from the public pieces, with Triton left
to the first launch.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op, infer_schema
from torch.nn import Parameter

from ultramem.ops.implementation import forced_implementation, runs_triton


class _Source:
    """What torch.compile's graph cache hashes of an inlined op: all that decides which body it gets.

    That cache keys a graph by the names of its ops, so after an upgrade it would serve the old body of an op. Of a
    `triton_op` it hashes the kernels, as it does of this stand-in for one. Besides the files that the body may come
    from, it names the implementation that is in force and the C++ library, whose ops may be in the graph.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = lambda: None  # where a kernel names the kernels that it calls
        self.__name__ = fn.__name__
        self._file = inspect.getsourcefile(fn)

    @property
    def src(self) -> str:
        from ultramem.ops.native.library import library

        return f"# {self.__name__} {self._files} {forced_implementation().value} {library().file}"

    @cached_property
    def _files(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        files = {Path(self._file)} if self._file else set()
        for file in sorted(files.union(Path(__file__).parent.rglob("*.py"))):
            digest.update(file.read_bytes())
        return digest.hexdigest()


class TraceableOp:
    """An op that is its body where nobody would see the op: no gradient to record, nothing that traces or profiles.

    The way through the dispatcher is Python for the most part, and longer than one token's lookup.
    """

    def __init__(self, op: CustomOpDef, body: Callable[..., Any]) -> None:
        self.overload, self.body = op._opoverload, body
        self.name: str = op._opoverload._schema.name
        self.register_autograd = op.register_autograd

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling() and _is_unseen(args):
            if _named_bodies:
                with torch._C._profiler._RecordFunctionFast(self.name):
                    return self.body(*args)
            return self.body(*args)
        return self.overload(*args)


_bodies_only = _named_bodies = False


@contextmanager
def bodies_only(*, named: bool = False) -> Iterator[None]:
    """Ops are their bodies for whoever traces or profiles in here too, where they record no gradient.

    With `named` a profiler has an event of the op's name around its body.
    """
    global _bodies_only, _named_bodies
    before = _bodies_only, _named_bodies
    _bodies_only, _named_bodies = True, named
    try:
        yield
    finally:
        _bodies_only, _named_bodies = before


def _is_unseen(args: tuple[Any, ...]) -> bool:
    records = torch.is_grad_enabled()
    for arg in args:
        if isinstance(arg, Tensor) and (type(arg) not in (Tensor, Parameter) or (records and arg.requires_grad)):
            return False
    return _bodies_only or not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level()
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._get_tracing_state()
    )


def traceable_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register `fn` as op `name`, keep it whole in `torch.export`, inline it in `torch.compile` and AOTInductor.

    `fn` must be made of PyTorch operators and of Triton kernels wrapped by `torch.library.wrap_triton`; it serves as
    its own fake kernel. Its first argument is the tensor that decides on the implementation.
    """

    def register(fn: Callable[..., Any]) -> Any:
        def eager(*args: Any) -> Any:
            if not runs_triton(args[0]):
                return fn(*args)
            # Kernel launches on real tensors need not go through the higher-order op, which costs about 1 ms each.
            from torch._library.triton import set_wrap_triton_enabled

            with set_wrap_triton_enabled(False):
                return fn(*args)

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

        from torch._library.triton import triton_ops_to_kernels

        triton_ops_to_kernels[name] = [_Source(fn)]
        return TraceableOp(op, eager)

    return register


def opaque_op(name: str, *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register `fn` as op `name` that no compiler looks into: for bodies whose order of additions must not change.

    `mutates` names the arguments that it writes to.
    """

    def register(fn: Callable[..., Any]) -> Any:
        return custom_op(name, fn, mutates_args=mutates, schema=infer_schema(fn, mutates_args=mutates))

    return register


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is added up in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
