"""The ops of this package as ONNX: nodes of domain `ultramem`, version 1, each with a body of standard operators.

A runtime with its own kernel for such a node (an ONNX Runtime custom op, a TensorRT plugin) runs that; any other runs
the body. In the bodies, as in the ops: T tokens, H heads, R ranks, N the side of the grid, K slots, C cores, E blocks,
D value dim, S rows (or columns) of a tail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ultramem.export.onnx_expert_body import GROUPED_MM
from ultramem.export.onnx_lookup_bodies import lookup_bodies
from ultramem.export.onnx_permute_body import permute_addresses_body
from ultramem.export.onnx_select_bodies import select_bodies
from ultramem.ops.permute_addresses import schedule
from ultramem.ops.tucker_topk import CANDIDATES, Candidates

DOMAIN = "ultramem"
VERSION = 1
OPSET = 20


def function_protos(
    candidates: Candidates = "one_tailed", *, bits: int = 8, double: bool = False, opset: int = OPSET
) -> dict[str, Any]:
    """The body of each op as a FunctionProto, by op type.

    Args:
        candidates: the rule of TuckerTopK. A file holds nodes of one rule, and their attribute `candidates` tells it to
            kernels.
        bits: of the rows of LookupReduceQuantized, which the attribute `bits` tells.
        double: add up in float64 instead of float32.
        opset: of the standard operators.
    """
    from onnx import TensorProto, parser

    assert candidates in CANDIDATES, candidates
    sum_type = int(TensorProto.DOUBLE if double else TensorProto.FLOAT)
    texts = {
        "GroupedMM": GROUPED_MM,
        **lookup_bodies(bits, sum_type),
        "PermuteAddresses": permute_addresses_body(),
        **select_bodies(candidates, sum_type),
    }
    told = {"TuckerTopK": f"candidates = {candidates}", "LookupReduceQuantized": f"bits = {bits}"}
    found = {}
    for name in sorted(texts):
        function = parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{texts[name]}')
        for node in function.node:
            node.name = node.output[0]
        function.doc_string = told.get(name, "")
        found[name] = function
    return found


@contextlib.contextmanager
def schemas() -> Iterator[None]:
    """Signatures of the nodes, known to onnx inside the block."""
    from onnx import defs

    made = [_schema(defs, *signature) for signature in _SIGNATURES]
    for schema in made:
        defs.register_schema(schema)
    try:
        yield
    finally:
        for schema in made:
            defs.deregister_schema(schema.name, VERSION, DOMAIN)


_FLOATS = ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"]
# T: of a table or of scores; S: of scores beside a narrower table; W: in which scores are added up; R: int8 rows, or
# two int4 a byte.
_TYPES = {
    "T": _FLOATS,
    "S": _FLOATS,
    "W": ["tensor(float)", "tensor(double)"],
    "R": ["tensor(int8)", "tensor(uint8)"],
}
_INT64, _FLOAT = "tensor(int64)", "tensor(float)"
_SIGNATURES: tuple[tuple[str, dict[str, str], dict[str, str], dict[str, str]], ...] = (
    ("GroupedMM", {"inputs": "T", "weights": "T", "ends": "tensor(int32)"}, {"products": "T"}, {}),
    ("LookupDot", {"rows": "T", "indices": _INT64, "query": "T"}, {"dots": "T"}, {}),
    ("LookupReduce", {"values": "T", "indices": _INT64, "scores": "S"}, {"pooled": "T"}, {"num_blocks": "INT"}),
    (
        "LookupReduceQuantized",
        {"rows": "R", "scales": _FLOAT, "indices": _INT64, "scores": "S"},
        {"pooled": "S"},
        {"num_blocks": "INT", "bits": "INT"},
    ),
    (
        "PermuteAddresses",
        {"addresses": _INT64},
        {"permuted": _INT64},
        {"size": "INT", "seed": "INT", "sides": "INTS", "keys": "INTS"},
    ),
    ("ProductTopK", {"row_scores": "T", "col_scores": "T"}, {"scores": "T", "addresses": _INT64}, {"k": "INT"}),
    (
        "TuckerTopK",
        {"row_scores": "T", "col_scores": "T", "cores": "W", "u": "W", "t": "W"},
        {"scores": "T", "addresses": _INT64},
        {"k": "INT", "candidates": "STRING"},
    ),
)


def _schema(defs: Any, name: str, inputs: dict[str, str], outputs: dict[str, str], attributes: dict[str, str]) -> Any:
    schema = defs.OpSchema
    return schema(
        name,
        DOMAIN,
        VERSION,
        inputs=[schema.FormalParameter(each, kind) for each, kind in inputs.items()],
        outputs=[schema.FormalParameter(each, kind) for each, kind in outputs.items()],
        type_constraints=[(kind, _TYPES[kind], "") for kind in _TYPES if kind in inputs.values()],
        attributes=[
            schema.Attribute(each, getattr(schema.AttrType, kind), "", required=True)
            for each, kind in attributes.items()
        ],
    )


def translations() -> dict[Any, Callable[..., Any]]:
    """For torch.onnx: which node each op becomes. Call inside `schemas()`."""
    from onnx import TensorProto
    from onnxscript import values as script

    nodes, standard = script.Opset(DOMAIN, VERSION), script.Opset("", OPSET)

    def grouped_mm(inputs: Any, weights: Any, ends: Any) -> Any:
        return nodes.GroupedMM(inputs, weights, ends)

    def sort_stable(x: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
        """torch.onnx has none. TopK prefers the lower index among equals, so it is stable."""
        size = standard.Gather(standard.Shape(x), standard.Constant(value_ints=[dim]), axis=0)
        return standard.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    def lookup_dot(rows: Any, indices: Any, query: Any, sparse_grad: bool) -> Any:
        return nodes.LookupDot(rows, indices, query)

    def permute_addresses(addresses: Any, size: int, seed: int, inverse: bool) -> Any:
        if inverse:
            raise ValueError("an inverse address permutation has no ONNX node")
        return nodes.PermuteAddresses(addresses, seed=seed, **permutation_attributes(size, seed))

    def permuted(table: Any, indices: Any, num_blocks: int, seed: int | None) -> Any:
        return indices if seed is None else permute_addresses(indices, table.shape[0] * num_blocks, seed, False)

    def lookup_reduce(
        values: Any,
        indices: Any,
        scores: Any,
        num_blocks: int,
        sparse_grad: bool,
        permutation_seed: int | None = None,
    ) -> Any:
        indices = permuted(values, indices, num_blocks, permutation_seed)
        return nodes.LookupReduce(values, indices, scores, num_blocks=num_blocks)

    def lookup_reduce_quantized(
        rows: Any, scales: Any, indices: Any, scores: Any, num_blocks: int, permutation_seed: int | None = None
    ) -> Any:
        bits = {int(TensorProto.INT8): 8, int(TensorProto.UINT8): 4}.get(int(rows.dtype))
        if bits is None:
            raise ValueError(f"rows of {rows.dtype.name} have no ONNX node: quantise to int8, or to int4 in uint8")
        indices = permuted(rows, indices, num_blocks, permutation_seed)
        return nodes.LookupReduceQuantized(rows, scales, indices, scores, num_blocks=num_blocks, bits=bits)

    def product_topk(row_scores: Any, col_scores: Any, k: int) -> Any:
        return nodes.ProductTopK(row_scores, col_scores, k=k)

    def tucker_topk(row_scores: Any, col_scores: Any, cores: Any, u: Any, t: Any, k: int, candidates: str) -> Any:
        wide = int(row_scores.dtype) == TensorProto.DOUBLE
        to = int(TensorProto.DOUBLE if wide else TensorProto.FLOAT)
        weights = [x if int(x.dtype) == to else standard.Cast(x, to=to) for x in (cores, u, t)]
        return nodes.TuckerTopK(row_scores, col_scores, *weights, k=k, candidates=candidates)

    ops = torch.ops.ultramem
    return {
        ops.grouped_mm.default: grouped_mm,
        ops.lookup_dot.default: lookup_dot,
        ops.lookup_reduce.default: lookup_reduce,
        ops.lookup_reduce_quantized.default: lookup_reduce_quantized,
        ops.permute_addresses.default: permute_addresses,
        ops.product_topk.default: product_topk,
        ops.tucker_topk.default: tucker_topk,
        torch.ops.aten.sort.stable: sort_stable,
    }


def permutation_attributes(size: int, seed: int) -> dict[str, Any]:
    """Attributes of a PermuteAddresses node that its body computes from."""
    plan = schedule(size, seed)
    return {"size": size, "sides": [plan.a, plan.b], "keys": [word for key in plan.keys for word in key]}
