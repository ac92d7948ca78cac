"""Bytes and FLOPs of one operator by its shapes, whichever engine runs it.

Bytes: each operand read once and each result written once; what is only a view of another moves nothing; an expanded
dimension counts once. Of a table that an index picks rows from, as many rows as there are indices, at most all of them
(`arithmetic` counts rows in the same way). FLOPs: those of products and of this package's ops; as there, norms,
activations and comparisons are not counted. Attention counts every pair of a query and a key that its operands have,
masked or not, as the kernels compute them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ultramem.ops.tucker_topk import tail_length
from ultramem.runtime.profile.arithmetic import select_flops


class Work(NamedTuple):
    """What a node must compute and move."""

    flops: int
    bytes: int

    def __add__(self, other: object) -> Work:
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.flops + other.flops, self.bytes + other.bytes)


NO_WORK = Work(0, 0)


class Operand(NamedTuple):
    """A tensor that an operator reads or writes."""

    shape: tuple[int, ...]
    element_bytes: int
    elements: int
    """Different ones in memory."""

    @property
    def bytes(self) -> int:
        return self.elements * self.element_bytes

    @property
    def row_bytes(self) -> int:
        return self.bytes // self.shape[0] if self.shape and self.shape[0] else 0


def operand(shape: Sequence[int], element_bytes: int) -> Operand:
    """One whose elements are all different."""
    return Operand(tuple(shape), element_bytes, math.prod(shape))


def operator_work(
    name: str, inputs: Sequence[Operand], outputs: Sequence[Operand], arguments: Mapping[str, Any] | None = None
) -> Work:
    """Work of an operator.

    Args:
        name: PyTorch's ("aten::mm", "ultramem_native::lookup_reduce") or ONNX's ("MatMul").
        inputs: tensors that it reads, in the order of its schema.
        outputs: those that it writes.
        arguments: that are no tensors, by name.
    """
    plain = plain_name(name)
    if plain in _VIEWS:
        return NO_WORK
    formula = _FLOPS.get(plain)
    flops = formula(inputs, outputs, arguments or {}) if formula is not None else 0
    return Work(flops, _read_bytes(plain, inputs, outputs) + sum(each.bytes for each in outputs))


def has_products(name: str) -> bool:
    """Whether FLOPs of the operator are counted."""
    return plain_name(name) in _FLOPS


def plain_name(name: str) -> str:
    """The operator's name in the tables here: "aten::mm.out" -> "mm", "TuckerTopK" -> "tucker_topk"."""
    plain = name.rpartition("::")[2].partition(".")[0]
    return _ONNX_NAMES.get(plain, plain)


def _read_bytes(plain: str, inputs: Sequence[Operand], outputs: Sequence[Operand]) -> int:
    tables, asked = 0, 0
    if plain in _PICK:  # what it writes is what it picked
        tables, asked = 1, sum(each.bytes for each in outputs)
    elif plain in _POOL:
        tables = _POOL[plain]
        asked = sum(each.row_bytes for each in inputs[:tables]) * math.prod(inputs[tables].shape)
    elif plain == "grouped_mm":  # a token has one expert
        used = min(inputs[0].shape[0], inputs[1].shape[0])
        return inputs[0].bytes + used * inputs[1].row_bytes + inputs[2].bytes
    of_tables = min(asked, sum(each.bytes for each in inputs[:tables]))
    return of_tables + sum(each.bytes for each in inputs[tables:])


_ONNX_NAMES = {
    "GroupedMM": "grouped_mm",
    "LookupDot": "lookup_dot",
    "LookupReduce": "lookup_reduce",
    "LookupReduceQuantized": "lookup_reduce_quantized",
    "ProductTopK": "product_topk",
    "TuckerTopK": "tucker_topk",
}
# ONNX's, which ONNX Runtime runs in place or by reading shapes alone; PyTorch's are told by where their result lies.
_VIEWS = {"Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"}
_PICK = {"embedding", "gather", "index", "index_select", "Gather", "GatherElements", "GatherND", "Slice"}
# How many tables there are before the indices.
_POOL = {
    "_embedding_bag": 1,
    "_embedding_bag_forward_only": 1,
    "lookup_dot": 1,
    "lookup_reduce": 1,
    "lookup_reduce_quantized": 2,
}

_Formula = Callable[[Sequence[Operand], Sequence[Operand], Mapping[str, Any]], int]


def _product(first: int) -> _Formula:
    """2 x results x inner dimension, which the operand at `first` has last."""

    def flops(inputs: Sequence[Operand], outputs: Sequence[Operand], arguments: Mapping[str, Any]) -> int:
        shape = inputs[first].shape
        transposed = arguments.get("transA", 0) and len(shape) > 1
        return 2 * math.prod(outputs[0].shape) * shape[-2 if transposed else -1]

    return flops


def _attention(inputs: Sequence[Operand], outputs: Sequence[Operand], arguments: Mapping[str, Any]) -> int:
    query, key, value = (each.shape for each in inputs[:3])
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _convolution(inputs: Sequence[Operand], outputs: Sequence[Operand], arguments: Mapping[str, Any]) -> int:
    return 2 * math.prod(outputs[0].shape) * math.prod(inputs[1].shape[1:])


def _einsum(inputs: Sequence[Operand], outputs: Sequence[Operand], arguments: Mapping[str, Any]) -> int:
    """A product and an addition for each different index."""
    terms = str(arguments["equation"]).replace(" ", "").partition("->")[0].split(",")
    sizes = {
        label: size
        for term, each in zip(terms, inputs, strict=True)
        for label, size in zip(term, each.shape, strict=True)
    }
    return 2 * math.prod(sizes.values()) * (len(terms) - 1)


def _pooled(inputs: Sequence[Operand], outputs: Sequence[Operand], arguments: Mapping[str, Any]) -> int:
    indices = next(each for each in inputs[1:] if each.element_bytes == 8)
    return 2 * math.prod(indices.shape) * outputs[0].shape[-1]


def _dots(inputs: Sequence[Operand], outputs: Sequence[Operand], arguments: Mapping[str, Any]) -> int:
    return 2 * math.prod(inputs[1].shape) * inputs[0].shape[-1]


def _tucker(inputs: Sequence[Operand], outputs: Sequence[Operand], arguments: Mapping[str, Any]) -> int:
    tokens, heads, rank, side = inputs[0].shape
    top_m = outputs[1].shape[-1]
    two = arguments.get("two_tails", arguments.get("candidates") == "two_tailed")
    grids, grid_side = (2, tail_length(top_m)) if two else (1, top_m)
    cores = inputs[2].shape[1]
    return tokens * heads * select_flops(rank, side, top_m, cores, grids=grids, grid_side=grid_side)


def _pkm(inputs: Sequence[Operand], outputs: Sequence[Operand], arguments: Mapping[str, Any]) -> int:
    """The m x m candidates' sums."""
    tokens, heads, top_m = outputs[1].shape
    return tokens * heads * top_m**2


def _grouped(inputs: Sequence[Operand], outputs: Sequence[Operand], arguments: Mapping[str, Any]) -> int:
    return 2 * math.prod(inputs[0].shape) * inputs[1].shape[-1]


_FLOPS: dict[str, _Formula] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "MatMul", "FusedMatMul", "Gemm"), _product(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _product(1)),
    **dict.fromkeys(("convolution", "Conv"), _convolution),
    **{
        f"_scaled_dot_product_{kind}": _attention
        for kind in ("cudnn_attention", "efficient_attention", "flash_attention", "flash_attention_for_cpu")
    },
    "Einsum": _einsum,
    **dict.fromkeys(
        ("_embedding_bag", "_embedding_bag_forward_only", "lookup_reduce", "lookup_reduce_quantized"), _pooled
    ),
    "lookup_dot": _dots,
    "tucker_topk": _tucker,
    "product_topk": _pkm,
    "grouped_mm": _grouped,
}
