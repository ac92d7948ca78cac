"""Bytes and FLOPs of the operators that eager runs: every call that reaches a kernel, seen with its tensors.

A forward of its own runs under the profiler and under a dispatch mode. The mode sees the kernels' calls, and leaves an
event of the profiler behind each; the profiler's spans say in which of the graph's nodes that event lies.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ultramem.runtime.profile.operator_work import NO_WORK, Operand, Work, operator_work
from ultramem.runtime.profile.profiled_calls import CALL, Span, profiled_spans
from ultramem.runtime.profile.stages import MODULE_KIND, NodeTime

_SEEN = "ultramem::work "
_OVERWRITES = ("copy_", "fill_", "zero_")
"""Do not read what they write to."""
_PUTS = ("index_copy_", "index_put_", "scatter_")
"""Write as much as they are given into a larger tensor, which they do not read."""
_TOUCHES_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class WorkSeen(TorchDispatchMode):
    """Notes the work of every operator that runs inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Work] = []

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self:  # what an operator is made of, such as a product and a bias, is seen in its place
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        self.found.append(_work(func, args, kwargs or {}, result))
        with torch._C._profiler._RecordFunctionFast(f"{_SEEN}{len(self.found) - 1}"):
            return result


def eager_work(
    call: Callable[[], object],
    nodes_of: Callable[[Sequence[Span]], Sequence[NodeTime]],
    *,
    unseen: bool = True,
) -> dict[str, Work]:
    """Work of each node of a forward, by the node's name.

    Args:
        call: the forward.
        nodes_of: the nodes in the profiler's spans of it.
        unseen: whether ops of this package are the operators in their bodies, or operators themselves.
    """
    with WorkSeen() as seen:
        spans = profiled_spans(call, 1, unseen=unseen)
    start_us = next(span.start_us for span in spans if span.name == CALL)
    notes = sorted(
        (span.start_us - start_us, int(span.name.removeprefix(_SEEN))) for span in spans if span.name.startswith(_SEEN)
    )
    nodes = nodes_of([span for span in spans if not span.name.startswith(_SEEN)])
    return {
        node.node: sum((seen.found[index] for _, index in _inside(notes, node)), NO_WORK)
        for node in nodes
        if node.kind != MODULE_KIND
    }


def _inside(notes: list[tuple[float, int]], node: NodeTime) -> list[tuple[float, int]]:
    end = bisect.bisect(notes, (node.start_us + node.span_us,))
    return notes[bisect.bisect_left(notes, (node.start_us,)) : end]


def _work(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Work:
    schema = func._schema
    given = dict(zip((each.name for each in schema.arguments), args, strict=False)) | kwargs
    written = {each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write}
    plain = schema.name.rpartition("::")[2]
    is_view = not written and _storages([result]) & _storages(given.values())
    if is_view or plain in _TOUCHES_NOTHING:
        return NO_WORK
    read = _operands(value for name, value in given.items() if name not in written or not _replaces(plain, name))
    if plain in _PUTS:
        return Work(0, sum(each.bytes for each in read) + read[-1].bytes)
    others = {name: value for name, value in given.items() if not _has_tensor(value)}
    return operator_work(schema.name, read, _operands([result]), others)


def _replaces(plain: str, argument: str) -> bool:
    """Whether what was in a tensor that is written to is not read."""
    return argument == "out" or plain in _PUTS or plain in _OVERWRITES


def _operands(values: Iterable[Any]) -> list[Operand]:
    """Each tensor once, in order."""
    tensors = [leaf for value in values for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [_operand(each) for each in {id(tensor): tensor for tensor in tensors}.values()]


def _storages(values: Iterable[Any]) -> set[int]:
    """Where tensors that have elements begin in memory."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor)} - {0}


def _operand(tensor: Tensor) -> Operand:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return Operand(tuple(tensor.shape), tensor.element_size(), elements)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
