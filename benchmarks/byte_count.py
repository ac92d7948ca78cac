"""Count the bytes that kernels load and store, in Triton's interpreter: import it with TRITON_INTERPRET set."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, interpreter_builder

from benchmarks.op_calls import OperatorRecorder
from ultramem import ops


@dataclass(slots=True)
class Access:
    """Bytes of one argument of one kernel."""

    loaded: int = 0
    stored: int = 0
    itemsize: int = 0
    addresses: list[Any] = field(default_factory=list)
    """Of the elements, as often as they are accessed."""


class Counted(NamedTuple):
    """What one call of an op asked for."""

    accesses: dict[tuple[str, str], Access]
    """By (kernel, argument)."""
    operator_bytes: int
    """Arguments and results of PyTorch operators."""
    outputs: list[Tensor]

    @property
    def asked(self) -> int:
        return self.operator_bytes + sum(access.loaded + access.stored for access in self.accesses.values())

    def touched(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of these tensors that kernels touched, each once however often."""
        spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors]
        elements: dict[int, list[Any]] = collections.defaultdict(list)  # by their size
        for access in self.accesses.values():
            elements[access.itemsize] += access.addresses
        return sum(
            itemsize * int(((unique >= first) & (unique < last)).sum())
            for itemsize, unique in ((size, np.unique(np.concatenate(each))) for size, each in elements.items())
            for first, last in spans
        )


def count(run: Callable[..., Any], inputs: Iterable[Tensor]) -> Counted:
    """Run an op in the interpreter and count."""
    accesses: dict[tuple[str, str], Access] = collections.defaultdict(Access)
    recorder = OperatorRecorder()
    arguments: list[tuple[str, str, int, int]] = []  # kernel, argument, first and last address
    launch, load, store = (
        GridExecutor.__call__, interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
    )  # fmt: skip

    def counting_launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        names = inspect.getfullargspec(executor.fn).args
        tensors = {name: x for name, x in {**dict(zip(names, args, strict=False)), **kwargs}.items() if _holds(x)}
        arguments[:] = [
            (executor.fn.__name__, name, x.data_ptr(), x.data_ptr() + x.nbytes) for name, x in tensors.items()
        ]
        recorder.paused = True  # what the interpreter itself computes
        try:
            return launch(executor, *args, **kwargs)
        finally:
            recorder.paused = False

    def access(pointers: Any, mask: Any) -> tuple[Access, int]:
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.asarray(pointers.data)[np.broadcast_to(mask.data, np.shape(pointers.data))]
        if not addresses.size:
            return Access(), 0
        where = next((kernel, name) for kernel, name, first, last in arguments if first <= addresses[0] < last)
        found = accesses[where]
        found.itemsize = itemsize
        found.addresses.append(addresses)
        return found, addresses.size * itemsize

    def counting_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        found, num_bytes = access(pointers, mask)
        found.loaded += num_bytes
        return load(pointers, mask, *rest)

    def counting_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found, num_bytes = access(pointers, mask)
        found.stored += num_bytes
        return store(pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", counting_launch),
        mock.patch.object(interpreter_builder, "create_masked_load", counting_load),
        mock.patch.object(interpreter_builder, "create_masked_store", counting_store),
        ops.use_implementation(ops.Implementation.TRITON),
        torch.no_grad(),
        recorder,
    ):
        output = run(*inputs)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    return Counted(dict(accesses), sum(call.num_bytes for call in recorder.calls), outputs)


def _holds(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() > 0
